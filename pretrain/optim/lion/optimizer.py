"""timm's Lion."""

from __future__ import annotations

from typing import Any

from timm import optim as timm_optim

from pretrain.optim.lion.config import Lion


def build(groups: list[dict[str, Any]], config: Lion, *, fused: bool) -> timm_optim.Lion:
    """Chen et al. 2023 (arXiv:2302.06675), Algorithm 2; there is no fused form."""
    return timm_optim.Lion(groups, lr=0.0, betas=config.betas)
