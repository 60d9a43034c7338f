"""Every objective, at every ZeRO stage: the same however its batch is cut, elastic, and resumed to the bit."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pretrain.checkpoints import checkpoint
from pretrain.engine.engine import Engine
from pretrain.monitoring.throughput import flops_per_sample
from pretrain.runtime.collectives import World, barrier
from pretrain.runtime.state import Progress, RunState
from tests.checkpoints.test_checkpoint import save
from tests.contracts.test_cut_batches import (
    CUTS,
    GLOBAL_SIZE,
    accumulations,
    check_gradients,
    engine_of,
    scale,
    share,
)
from tests.contracts.test_objectives import CASES
from tests.engine.test_engine import STAGES
from tests.objectives.cases import batch_for
from tests.ranks import run_ranks

pytestmark = pytest.mark.slow

SAVED_AT, TRAINED_ON = 2, 3
CHAIN = {3: (1, 3), 1: (2, 0), 2: (3, 1)}  # each world hands on to the next


@pytest.mark.parametrize(("world_size", "accumulation"), CUTS)
def test_a_batch_gives_the_same_gradient_however_it_is_cut(
    world_size: int, accumulation: int, figure: Callable[[str], None]
) -> None:
    """At all of the stages; `make test` tries each objective at one of them, and in one way of cutting."""
    names = [name for name in CASES if accumulation in accumulations(name)]
    check_gradients(world_size, [(name, stage, accumulation) for name in names for stage in STAGES])
    figure(f"{world_size} x {accumulation}: {', '.join(names)}")


def counted(world: World) -> list[str]:
    """Cases whose FLOPs are counted without any rank's help: that is done before they are on a device."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a collective outside of training")

    names = []
    with pytest.MonkeyPatch.context() as patched:
        for name in ("all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter", "broadcast"):
            patched.setattr(torch.distributed, name, refuse)
        for name, case in CASES.items():
            assert flops_per_sample(case.build()) > 0
            names.append(name)
    return names


def test_in_evaluation_mode_no_objective_calls_a_collective() -> None:
    assert run_ranks(counted, 2) == [list(CASES)] * 2


def steps(engine: Engine, world: World, first: int, num: int) -> list[float]:
    """Small ones: AdamW's do not shrink with the gradient, and where that is all rounding, which depends on the number
    of ranks, so is the step.
    """
    losses = []
    for at in range(first, first + num):
        batches = share(batch_for(engine.objective.needs, GLOBAL_SIZE, seed=at), world, 1)
        losses.append(float(engine.step(batches, Progress(at, 99, 0), 1e-3).metrics["loss"]))
    return losses


def at(folder: Path, step: int) -> Path:
    return folder / checkpoint.folder_name(step)


def start(world: World, folder: Path) -> dict[str, list[float]]:
    losses = {}
    for name in CASES:
        engine = engine_of(world, name, 2)
        steps(engine, world, 0, SAVED_AT)
        save(folder / name, engine, RunState(Progress(SAVED_AT, 99, 0)), world)
        losses[name] = steps(engine, world, SAVED_AT, TRAINED_ON)
        save(folder / name, engine, RunState(Progress(SAVED_AT + TRAINED_ON, 99, 0)), world)
    return losses


def loaded(world: World, name: str, source: Path, stage: int) -> Engine:
    """With the state of a checkpoint in place of another."""
    engine = engine_of(world, name, stage, seed=7)
    steps(engine, world, 50, 1)
    checkpoint.load(checkpoint.open_checkpoint(source, world), engine.state)
    return engine


def go_on(world: World, source: Path, folder: Path) -> dict[str, list[float]]:
    losses = {}
    for name in CASES:
        engine = loaded(world, name, at(source / name, SAVED_AT), 2)
        losses[name] = steps(engine, world, SAVED_AT, TRAINED_ON)
        save(folder / name, engine, RunState(Progress(SAVED_AT + TRAINED_ON, 99, 0)), world)
    return losses


Uninterrupted = tuple[Path, list[dict[str, list[float]]]]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Uninterrupted:
    """Checkpoints and each rank's losses of every objective, on two ranks at ZeRO 2."""
    folder = tmp_path_factory.mktemp("start")
    return folder, run_ranks(start, 2, folder)


def test_a_run_that_goes_on_is_the_uninterrupted_one_to_the_bit(uninterrupted: Uninterrupted, tmp_path: Path) -> None:
    """Every weight, teacher, running statistic and optimizer state, on two ranks at ZeRO 2."""
    source, ranks = uninterrupted
    assert run_ranks(go_on, 2, source, tmp_path) == ranks
    for name, case in CASES.items():
        end = checkpoint.digests(at(source / name, SAVED_AT + TRAINED_ON))
        assert checkpoint.digests(at(tmp_path / name, SAVED_AT + TRAINED_ON)) == end, name
        objective = case.build()
        kept = {f"param/{n}" for n, _ in objective.named_parameters()}
        kept |= {f"buffer/{n}" for n in objective.state_dict() if f"param/{n}" not in kept}
        assert kept <= end.keys(), name


def hand_on(world: World, source: Path, folder: Path) -> dict[tuple[str, int], list[float]]:
    losses = {}
    for name in CASES:
        handed = at(source / name, SAVED_AT)
        for stage in CHAIN[world.size]:
            engine = loaded(world, name, handed, stage)
            save(folder / str(stage) / name, engine, RunState(Progress(SAVED_AT, 99, 0)), world)
            barrier()
            handed = at(folder / str(stage) / name, SAVED_AT)
            losses[name, stage] = steps(engine, world, SAVED_AT, TRAINED_ON)
    return losses


def test_checkpoints_move_between_world_sizes_and_stages(
    uninterrupted: Uninterrupted, tmp_path: Path, figure: Callable[[str], None]
) -> None:
    """From two ranks at ZeRO 2 through other worlds: equal by hash at every stop, and trained on from alike."""
    (first, ranks), worst = uninterrupted, 0.0
    source = first
    for world_size, stages in CHAIN.items():
        folder = tmp_path / str(world_size)
        found = run_ranks(hand_on, world_size, source, folder)
        for name, stage in itertools.product(CASES, stages):
            original = checkpoint.digests(at(first / name, SAVED_AT))
            handed = checkpoint.digests(at(folder / str(stage) / name, SAVED_AT))
            assert handed == original, f"{name}, world {world_size}, ZeRO {stage}"
            losses = torch.tensor([rank[name, stage] for rank in found], dtype=torch.float64).mean(0)
            expected = torch.tensor([rank[name] for rank in ranks], dtype=torch.float64).mean(0)
            worst = max(worst, float(((losses - expected).abs() / expected.abs().clamp(min=scale(name))).max()))
            assert worst < 1e-5, (name, world_size, stage, losses, expected)
        source = folder / str(stages[-1])
    figure(f"{len(CASES)} objectives, next losses within {worst:.1e}")
