"""Checks of the precision that a run computes in: whether the device has instructions for it, and computes rightly."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from data_pipeline.errors import PretrainError
from launch.slurm.finding import Finding, from_error, ok, warning
from pretrain.engine.precision import kept_precision, refuse_wrong_bf16
from pretrain.models.seeded import seeded
from pretrain.objectives.contract import Objective
from pretrain.runtime.native_precision import native_precision


def precision(
    asked: str, wanted_device: str, resume_from: str | None, out: Path, build: Callable[[], Objective]
) -> Iterator[Finding]:
    """Checks the precision of a run that is started on this machine.

    Args:
        asked: the recipe's engine.precision.
        wanted_device: its runtime.device.
        resume_from: as in the recipe.
        out: the run's folder.
        build: makes the objective, where it has to be tried.
    """
    on_gpu = wanted_device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    native = native_precision(device)
    try:
        chosen = (kept_precision(resume_from, out) or native) if asked == "auto" else asked
        if chosen == "bf16" and not on_gpu:
            refuse_wrong_bf16(seeded(0, build))
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
