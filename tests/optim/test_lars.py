"""LARS' cases, and its update."""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.optim.config import OptimConfig
from pretrain.optim.lars.config import Lars
from tests.optim.cases import trust

CASES: dict[str, OptimConfig] = {
    "lars": Lars(kind="lars", base_lr=1.0, momentum=0.8, eta=0.01, weight_decay=0.3),
    "lars, no decay": Lars(kind="lars", base_lr=1.0, momentum=0.8, eta=0.01, weight_decay=0),
}
COUNTS_STEPS = False


def update(p: Tensor, grads: list[Tensor], lr: float, wd: float, adapt: bool) -> Tensor:
    """1708.03888, Eq. 6 and Algorithm 1, with the rate outside of the velocity."""
    velocity = torch.zeros_like(p)
    for g in grads:
        ratio = 0.01 * trust(p, float(g.norm() + wd * p.norm())) if adapt else 1.0
        velocity = 0.8 * velocity + ratio * (g + wd * p)
        p = p - lr * velocity
    return p
