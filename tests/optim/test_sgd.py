"""SGD's cases, and its update."""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.optim.config import OptimConfig
from pretrain.optim.sgd.config import Sgd

CASES: dict[str, OptimConfig] = {
    "sgd": Sgd(kind="sgd", base_lr=1.0, momentum=0.8, nesterov=True, weight_decay=0.3),
}
COUNTS_STEPS = False


def update(p: Tensor, grads: list[Tensor], lr: float, wd: float, adapt: bool) -> Tensor:
    velocity = torch.zeros_like(p)
    for g in grads:
        d = g + wd * p
        velocity = 0.8 * velocity + d
        p = p - lr * (d + 0.8 * velocity)
    return p
