"""Checkpoints between all world sizes from 1 to 4 and all ZeRO stages: equal by hash, and trained on from alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from data_pipeline.batch import Batch
from pretrain.checkpoints import checkpoint
from pretrain.engine.engine import Engine
from pretrain.objectives.contract import LossOutput
from pretrain.optim.adamw.config import AdamW
from pretrain.optim.config import Ema, OptimConfig
from pretrain.optim.sgd.config import Sgd
from pretrain.runtime.collectives import World, barrier
from pretrain.runtime.state import Progress, RunState
from tests.checkpoints.test_checkpoint import save
from tests.engine.test_engine import make_engine
from tests.optim.cases import of_other_kinds
from tests.ranks import run_ranks
from tests.toy import Toy, split, toy_batch

pytestmark = pytest.mark.slow

OPTIMS: dict[str, OptimConfig] = {
    "adamw": AdamW(base_lr=1e-2, weight_decay=0.1, clip_norm=0.5, layer_decay=0.5),
    "sgd": Sgd(kind="sgd", base_lr=1e-2, nesterov=True, weight_decay=0.1, layer_decay=0.5),
}
OPTIMS |= {kind: optim for kind, optim in of_other_kinds(OPTIMS).items() if optim.update == "elementwise"}
# Every (world size, stage) once; a world of one size takes its stages in turn, and hands on to the next world.
CHAIN = {3: (1, 2, 3, 0), 1: (2, 0, 3, 1), 4: (3, 1, 0, 2), 2: (0, 2, 1, 3)}
ACCUMULATION, GLOBAL_SIZE, SAVED_AT, TRAINED_ON = 2, 24, 3, 3


class Watched(Toy):
    """Running statistics that no loss depends on: batch statistics of a rank are another thing in another world."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.watch = nn.BatchNorm1d(75, affine=False)

    def forward(self, batch: Batch, progress: Progress) -> LossOutput:
        self.watch(batch.views[0].flatten(1))
        return super().forward(batch, progress)


def build(world: World, stage: int, kind: str, seed: int) -> Engine:
    return make_engine(
        world,
        stage,
        ACCUMULATION,
        objective=Watched(seed),
        optim=OPTIMS[kind],
        ema=Ema(decay=0.9),
        global_size=GLOBAL_SIZE,
    )


def steps(engine: Engine, world: World, first: int, num: int) -> list[float]:
    losses = []
    for at in range(first, first + num):
        batches = split(toy_batch(at, GLOBAL_SIZE), world.rank, world.size, ACCUMULATION)
        losses.append(float(engine.step(batches, Progress(at, 99, 0), 1e-2).metrics["loss"]))
    return losses


def start(world: World, folder: Path, kind: str) -> list[float]:
    engine = build(world, 0, kind, seed=0)
    steps(engine, world, 0, SAVED_AT)
    save(folder, engine, RunState(Progress(SAVED_AT, 99, 0)), world)
    return steps(engine, world, SAVED_AT, TRAINED_ON)


def hand_on(world: World, source: Path, folder: Path, kind: str) -> dict[int, list[float]]:
    """Loaded over another state, saved at once, trained on; by stage."""
    losses = {}
    for stage in CHAIN[world.size]:
        engine = build(world, stage, kind, seed=7)
        steps(engine, world, 50, 1)
        state = checkpoint.load(checkpoint.open_checkpoint(source, world), engine.state)
        save(folder / str(stage), engine, state, world)
        barrier()
        source = folder / str(stage) / checkpoint.folder_name(SAVED_AT)
        losses[stage] = steps(engine, world, SAVED_AT, TRAINED_ON)
    return losses


@pytest.mark.parametrize("kind", OPTIMS)
def test_any_world_size_and_stage_goes_on_from_any(tmp_path: Path, kind: str, figure: Callable[[str], None]) -> None:
    """More than two parameter groups, odd-sized tensors, running statistics, moving averages, accumulation."""
    (expected,) = run_ranks(start, 1, tmp_path / "start", kind)
    source = tmp_path / "start" / checkpoint.folder_name(SAVED_AT)
    original = checkpoint.digests(source)
    assert {name.split("/")[0] for name in original} == {"param", "optim", "ema", "buffer", "groups"}
    for world_size, stages in CHAIN.items():
        folder = tmp_path / str(world_size)
        ranks = run_ranks(hand_on, world_size, source, folder, kind)
        for stage in stages:
            source = folder / str(stage) / checkpoint.folder_name(SAVED_AT)
            assert checkpoint.digests(source) == original, f"world {world_size}, ZeRO {stage}"
            losses = torch.tensor([rank[stage] for rank in ranks], dtype=torch.float64).mean(0)
            reference = torch.tensor(expected, dtype=torch.float64)
            worst = float(((losses - reference) / reference).abs().max())
            figure(f"{kind}, world {world_size}, ZeRO {stage}: equal by hash; next losses within {worst:.1e}")
            assert worst < 1e-5
