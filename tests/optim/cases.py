"""What the test module of an optimizer is made of: cases, and the update of its paper in plain arithmetic."""

from __future__ import annotations

from importlib import import_module
from typing import Any, Protocol

from torch import Tensor

from pretrain.optim.config import KINDS, OptimConfig, config_class


class Update(Protocol):
    """A parameter after one step for each of `grads`.

    Args:
        p: the parameter before them.
        lr: learning rate.
        wd: weight decay; 0 for what is not decayed.
        adapt: whether a norm of the whole parameter takes part, where the optimizer takes one.
    """

    def __call__(self, p: Tensor, grads: list[Tensor], lr: float, wd: float, adapt: bool) -> Tensor: ...


def module_of(kind: str) -> Any:
    """The test module of a kind: `CASES`, `update`, and `COUNTS_STEPS`, whether its state has a number of steps."""
    return import_module(f"tests.optim.test_{kind}")


def all_cases() -> dict[str, OptimConfig]:
    """Those of all kinds, by kind and what is special in them."""
    return {name: case for kind in KINDS for name, case in module_of(kind).CASES.items()}


def of_other_kinds(given: dict[str, OptimConfig]) -> dict[str, OptimConfig]:
    """One of each kind that is not among the given ones, at its defaults, for tests that train a little."""
    kinds = KINDS.keys() - {config.kind for config in given.values()}
    return {kind: config_class(kind)(kind=kind, base_lr=1e-2) for kind in KINDS if kind in kinds}


def trust(weight: Tensor, gradient: float) -> float:
    """The ratio of a parameter's norm to that of its update; 1 where either is 0."""
    norm = float(weight.norm())
    return norm / gradient if norm and gradient else 1.0
