"""What a run says of itself: while it starts, at its first step, and when it ends."""

from __future__ import annotations

from pathlib import Path

import torch

from pretrain.checkpoints.start import Start
from pretrain.preflight import Plan
from pretrain.recipe.recipe import EngineConfig
from pretrain.runtime.collectives import World
from pretrain.runtime.state import Progress


def opening(
    what: str, engine: EngineConfig, plan: Plan, world: World, device: torch.device, step: int, start: Start
) -> str:
    """What is trained on what, and from where it goes on.

    Args:
        what: is trained: the run's name, objective and model.
        step: steps applied so far.
    """
    resolved = plan.resolved
    size = f"{resolved.global_size} = {world.size} x {resolved.accumulation} x {resolved.micro_size}"
    return (
        f"{what}, {plan.train.num_samples} samples, batch "
        f"{size}, ZeRO {engine.zero_stage}, {engine.settled_precision}, {world.size} x {device.type}; "
        f"steps {step} to {resolved.total_steps}, {start.source}"
    )


def closing_line(out: Path, progress: Progress) -> str:
    """How far the run in a folder got, and where its encoder is."""
    step, total_steps, encoder = progress.step, progress.total_steps, out / "encoder"
    where = f"; the encoder is in {encoder}" if encoder.is_dir() else ""
    return f"{'finished' if step == total_steps else 'stopped'} at step {step} of {total_steps}{where}"
