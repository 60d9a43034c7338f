"""timm's LARS."""

from __future__ import annotations

from typing import Any

from timm import optim as timm_optim

from pretrain.optim.lars.config import Lars
from pretrain.optim.trust_ratio import adapt_what_is_decayed


def build(groups: list[dict[str, Any]], config: Lars, *, fused: bool) -> timm_optim.Lars:
    """You et al. 2017, Eq. 6, with momentum over the adapted gradient; there is no fused form."""
    optimizer = timm_optim.Lars(groups, lr=0.0, momentum=config.momentum, trust_coeff=config.eta)
    adapt_what_is_decayed(optimizer)
    return optimizer
