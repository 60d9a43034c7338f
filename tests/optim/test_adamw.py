"""AdamW's cases, and its update."""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.optim.adamw.config import AdamW
from pretrain.optim.config import OptimConfig

CASES: dict[str, OptimConfig] = {"adamw": AdamW(base_lr=1e-3, betas=(0.8, 0.7), eps=1e-5, weight_decay=0.3)}
COUNTS_STEPS = True


def update(p: Tensor, grads: list[Tensor], lr: float, wd: float, adapt: bool) -> Tensor:
    """1711.05101, Algorithm 2."""
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    for t, g in enumerate(grads, start=1):
        m, v = 0.8 * m + 0.2 * g, 0.7 * v + 0.3 * g * g
        p = p - lr * ((m / (1 - 0.8**t)) / ((v / (1 - 0.7**t)).sqrt() + 1e-5) + wd * p)
    return p
