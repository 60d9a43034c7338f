"""timm's LAMB."""

from __future__ import annotations

from typing import Any

import torch
from timm import optim as timm_optim

from pretrain.optim.lamb.config import Lamb
from pretrain.optim.trust_ratio import adapt_what_is_decayed


def build(groups: list[dict[str, Any]], config: Lamb, *, fused: bool) -> timm_optim.Lamb:
    """You et al. 2019, Algorithm 2; there is no fused form. It counts the steps of each group."""
    optimizer = timm_optim.Lamb(groups, lr=0.0, betas=config.betas, eps=config.eps, max_grad_norm=None)
    adapt_what_is_decayed(optimizer)
    for group in optimizer.param_groups:
        group["step"] = torch.tensor(0.0)
    return optimizer
