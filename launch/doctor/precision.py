"""Checks of the precision that a run computes in: whether the device has instructions for it, and computes rightly."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from data_pipeline.errors import InputError, PretrainError
from launch.slurm.finding import Finding, from_error, ok, warning
from pretrain.engine.precision import kept_precision, native_precision, refuse_wrong_bf16
from pretrain.models.seeded import seeded
from pretrain.objectives.contract import Objective
from pretrain.objectives.kinds import build_objective
from pretrain.recipe.recipe import Recipe


def precision(recipe: Recipe, out: Path) -> Iterator[Finding]:
    """Checks the precision of a run that is started on this machine.

    Args:
        recipe: of the run.
        out: its folder.
    """
    on_gpu = recipe.runtime.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    native, asked = native_precision(device), recipe.engine.precision
    try:
        chosen = (kept_precision(recipe, out) or native) if asked == "auto" else asked
        if chosen == "bf16" and not on_gpu:
            objective = _built(recipe)
            if objective is None:
                return
            refuse_wrong_bf16(objective)
    except PretrainError as raised:
        yield from_error("precision", raised)
        return
    kind = "GPU" if on_gpu else "CPU"
    has = f"this {kind} has {'' if native == 'bf16' else 'no '}instructions for bf16"
    if chosen == "bf16" and native == "fp32":
        fix = "Set engine.precision=auto, or fp32, for a run that has not begun."
        yield warning("precision", f"bf16, and {has}: a step takes several times as long as in fp32", fix)
    else:
        yield ok("precision", f"{chosen}{' (auto)' if asked == 'auto' else ''}; {has}")


def _built(recipe: Recipe) -> Objective | None:
    """The recipe's objective on the CPU; None: it cannot be built, which the check of the recipe says."""
    try:
        return seeded(recipe.seed, lambda: build_objective(recipe.model, recipe.objective))
    except InputError:
        return None
