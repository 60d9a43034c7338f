"""LAMB's cases, and its update."""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.optim.config import OptimConfig
from pretrain.optim.lamb.config import Lamb
from tests.optim.cases import trust

CASES: dict[str, OptimConfig] = {
    "lamb": Lamb(kind="lamb", base_lr=1.0, betas=(0.8, 0.7), eps=1e-5, weight_decay=0.3),
    "lamb, no decay": Lamb(kind="lamb", base_lr=1.0, betas=(0.8, 0.7), eps=1e-5, weight_decay=0),
}
COUNTS_STEPS = True


def update(p: Tensor, grads: list[Tensor], lr: float, wd: float, adapt: bool) -> Tensor:
    """1904.00962, Algorithm 2."""
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    for t, g in enumerate(grads, start=1):
        m, v = 0.8 * m + 0.2 * g, 0.7 * v + 0.3 * g * g
        r = (m / (1 - 0.8**t)) / ((v / (1 - 0.7**t)).sqrt() + 1e-5) + wd * p
        p = p - lr * (trust(p, float(r.norm())) if adapt else 1.0) * r
    return p
