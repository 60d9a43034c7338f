"""Lion's cases, and its update; the suites that find them: test_optim.py, test_engine.py, test_elastic.py."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from pretrain.optim.config import OptimConfig
from pretrain.optim.lion.config import Lion
from tests.recipe.recipes import SMALL, changed, load

CASES: dict[str, OptimConfig] = {
    "lion": Lion(kind="lion", base_lr=1.0, betas=(0.8, 0.7), weight_decay=0.3),
    "lion, no decay": Lion(kind="lion", base_lr=1.0, betas=(0.8, 0.7), weight_decay=0),
}
COUNTS_STEPS = False


def update(p: Tensor, grads: list[Tensor], lr: float, wd: float, adapt: bool) -> Tensor:
    """2302.06675, Algorithm 2."""
    m = torch.zeros_like(p)
    for g in grads:
        c = 0.8 * m + 0.2 * g
        p = p - lr * (c / c.abs() + wd * p)
        m = 0.7 * m + 0.3 * g
    return p


def test_every_zero_stage_takes_it(tmp_path: Path) -> None:
    tree = changed("optim", {"kind": "lion", "base_lr": 1e-4}, SMALL)
    for stage in range(4):
        assert load(tmp_path, changed("engine.zero_stage", stage, tree)).optim.moments() == ("exp_avg",)
