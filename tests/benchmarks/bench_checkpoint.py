"""What a checkpoint costs training: the time it stands still for one, and how much longer a run takes with them.

    python -m tests.benchmarks.bench_checkpoint [--rounds 7]

The stall is that of a ViT-B's whole training state, against one copy of the same bytes into memory that is there
already. The run is that of the step benchmark, saving every ten seconds or so: far more often than any run should.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from pretrain.checkpoints.writer import CheckpointWriter
from pretrain.engine.engine import Engine
from pretrain.objectives.kinds import build_objective
from pretrain.objectives.mae.config import MaeConfig
from pretrain.optim.adamw.config import AdamW
from pretrain.recipe.recipe import EngineConfig, Model
from pretrain.runtime.collectives import World, process_group
from pretrain.runtime.state import Progress, RunState
from tests.benchmarks.bench_step import benched, blank_batch, engine_of

STALL_GOAL = 1.5
STEPS = 40  # of a run; one of them saves


def run(rounds: int = 7) -> list[list[str]]:
    """Rows of the table: what, seconds, ratio with its spread over rounds."""
    with process_group(World(), torch.device("cpu")):
        return [_stall(rounds), _slowdown(max(3, rounds // 2))]


def _stall(rounds: int) -> list[str]:
    torch.manual_seed(0)
    objective = build_objective(Model(name="vit_base_patch16_224"), MaeConfig(kind="mae"))
    engine = Engine(
        objective,
        AdamW(base_lr=1e-4),
        EngineConfig(zero_stage=1, precision="fp32"),
        world=World(),
        device=torch.device("cpu"),
        micro_size=1,
        accumulation=1,
        seed=0,
    )
    copies = [torch.empty_like(fragment.data) for fragment in engine.state.fragments()]
    ratios, stalls = [], []
    with tempfile.TemporaryDirectory() as folder:
        writer = CheckpointWriter(Path(folder), engine.state, world=World(), keep_last=1, say=lambda _: None)
        for number in range(rounds + 1):
            start = time.perf_counter()
            for copy, fragment in zip(copies, engine.state.fragments(), strict=True):
                copy.copy_(fragment.data)
            copied = time.perf_counter()
            writer.save(RunState(Progress(number + 1, 99, 0)))
            saved = time.perf_counter()
            writer.finish()  # the disk is not what is measured
            if number:  # the first makes the buffer
                stalls.append(saved - copied)
                ratios.append((saved - copied) / (copied - start))
    num_bytes = sum(copy.nbytes for copy in copies)
    return [
        f"checkpoint stall, {num_bytes / 1e9:.2f} GB",
        f"{statistics.median(stalls):.2f} s",
        f"{_spread(ratios)} of one copy",
        f"<= {STALL_GOAL}",
    ]


def _slowdown(rounds: int) -> list[str]:
    """A run with one save against the same steps without."""
    engine = engine_of(benched(), 1, 256, World())
    batch = blank_batch(engine.objective, 256)
    ratios, seconds = [], []
    with tempfile.TemporaryDirectory() as folder:
        writer = CheckpointWriter(Path(folder), engine.state, world=World(), keep_last=1, say=lambda _: None)
        for number in range(rounds):
            took = {}
            for saving in (False, True) if number % 2 else (True, False):
                start = time.perf_counter()
                for step in range(STEPS):
                    engine.step([batch], Progress(step, STEPS, 0), 1e-4)
                    if saving and step == STEPS // 4:
                        writer.save(RunState(Progress(number + 1, STEPS, 0)))
                took[saving] = time.perf_counter() - start
                writer.finish()
            ratios.append(took[True] / took[False])
            seconds.append(took[True])
    interval = f"every {statistics.median(seconds):.0f} s"
    return [
        f"run that saves {interval}",
        f"{statistics.median(seconds):.1f} s",
        f"{_spread(ratios)} of one without",
        "",
    ]


def _spread(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    for row in run(parser.parse_args().rounds):
        print("  ".join(row))
