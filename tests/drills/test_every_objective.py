"""Every objective, at every ZeRO stage: the same however its batch is cut, elastic, and resumed to the bit."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data_pipeline.batch import Batch
from pretrain.checkpoints import checkpoint
from pretrain.engine.engine import Engine
from pretrain.monitoring.metrics import flops_per_sample
from pretrain.optim.config import AdamW, OptimConfig, Sgd
from pretrain.preflight import cannot_accumulate
from pretrain.runtime.collectives import World, barrier
from pretrain.runtime.state import Progress, RunState
from tests.contracts.test_objectives import CASES, batch_for
from tests.pretrain.test_checkpoint import save
from tests.pretrain.test_engine import make_engine, whole_state
from tests.ranks import run_ranks

pytestmark = pytest.mark.slow

ADAMW = AdamW(base_lr=1e-2, weight_decay=0.1)
SGD = Sgd(kind="sgd", base_lr=1e-2, weight_decay=0)
GLOBAL_SIZE, SAVED_AT, TRAINED_ON = 12, 2, 3
STAGES = (0, 1, 2, 3)
CHAIN = {3: (1, 3), 1: (2, 0), 2: (3, 1)}  # each world hands on to the next


def rows(batch: Batch, start: int, stop: int) -> Batch:
    values: dict[str, Any] = {"keys": batch.keys[start:stop], "views": tuple(view[start:stop] for view in batch.views)}
    for field in ("labels", "weights", "tokens", "masks"):
        value = getattr(batch, field)
        values[field] = None if value is None else value[start:stop]
    return replace(batch, **values)


def share(batch: Batch, world: World, accumulation: int) -> list[Batch]:
    """This rank's micro-batches."""
    size = len(batch) // world.size // accumulation
    first = world.rank * accumulation
    return [rows(batch, at * size, (at + 1) * size) for at in range(first, first + accumulation)]


def engine_of(
    world: World, name: str, stage: int, accumulation: int = 1, optim: OptimConfig = ADAMW, seed: int = 0
) -> Engine:
    objective = CASES[name].build(seed)
    return make_engine(world, stage, accumulation, objective=objective, optim=optim, global_size=GLOBAL_SIZE)


Gradients = tuple[float, dict[str, Tensor]]  # (loss, gradient by name)


def gradients(world: World, accumulation: int) -> dict[tuple[str, int], Gradients]:
    """Of one step, by case and stage; SGD's momentum after one step is the gradient."""
    found = {}
    for name, stage in itertools.product(CASES, STAGES):
        if accumulation > 1 and cannot_accumulate(CASES[name].build()):
            continue  # refused before a run starts
        engine = engine_of(world, name, stage, accumulation, SGD)
        batch = batch_for(engine.objective.needs, GLOBAL_SIZE)
        result = engine.step(share(batch, world, accumulation), Progress(3, 10, 24), 1e-2)
        prefix = "optim/momentum_buffer/"
        momenta = {n.removeprefix(prefix): t for n, t in whole_state(engine).items() if n.startswith(prefix)}
        found[name, stage] = float(result.metrics["loss"]), momenta
    return found


def plain(world: World) -> dict[str, Gradients]:
    """Of the whole batch in one process, without an engine."""
    found = {}
    for name, case in CASES.items():
        objective = case.build().train()
        loss = objective(batch_for(objective.needs, GLOBAL_SIZE), Progress(3, 10, 24)).loss
        loss.backward()
        found[name] = loss.item(), {n: p.grad for n, p in objective.named_parameters() if p.grad is not None}
    return found


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_a_batch_gives_the_same_gradient_however_it_is_cut(
    world_size: int, accumulation: int, figure: Callable[[str], None]
) -> None:
    references = run_ranks(plain, 1)[0]
    ranks = run_ranks(gradients, world_size, accumulation)
    figure(f"{world_size} x {accumulation}: {', '.join(dict.fromkeys(name for name, _ in ranks[0]))}")
    for (name, stage), (_, found) in ranks[0].items():
        loss, expected = references[name]
        mean = sum(rank[name, stage][0] for rank in ranks) / world_size
        assert mean == pytest.approx(loss, rel=1e-6, abs=1e-6 * scale(name)), (name, stage)
        assert found.keys() == expected.keys()
        whole = torch.cat([gradient.flatten() for gradient in expected.values()]).norm()
        for parameter, gradient in expected.items():
            error = (found[parameter] - gradient).norm()
            # A bias before batch norm has none but rounding, which is that of the whole: two fp32 steps of it.
            bound = max(1e-5 * gradient.norm(), 2 * torch.finfo(torch.float32).eps * whole)
            assert error <= bound, (name, stage, parameter)


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


def test_a_run_that_goes_on_is_the_uninterrupted_one_to_the_bit(tmp_path: Path) -> None:
    """Every weight, teacher, running statistic and optimizer state, on two ranks at ZeRO 2."""
    ranks = run_ranks(start, 2, tmp_path / "start")
    assert run_ranks(go_on, 2, tmp_path / "start", tmp_path / "resumed") == ranks
    for name, case in CASES.items():
        end = checkpoint.digests(at(tmp_path / "start" / name, SAVED_AT + TRAINED_ON))
        assert checkpoint.digests(at(tmp_path / "resumed" / name, SAVED_AT + TRAINED_ON)) == end, name
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


def scale(name: str) -> float:
    """Of what a loss is a mean of: cosines may cancel, and their rounding does not."""
    return 1.0 if name.startswith(("byol", "simsiam")) else 0.1


def test_checkpoints_move_between_world_sizes_and_stages(tmp_path: Path, figure: Callable[[str], None]) -> None:
    """From two ranks at ZeRO 2 through other worlds: equal by hash at every stop, and trained on from alike."""
    source, worst = tmp_path / "start", 0.0
    ranks = run_ranks(start, 2, source)
    for world_size, stages in CHAIN.items():
        folder = tmp_path / str(world_size)
        found = run_ranks(hand_on, world_size, source, folder)
        for name, stage in itertools.product(CASES, stages):
            original = checkpoint.digests(at(tmp_path / "start" / name, SAVED_AT))
            handed = checkpoint.digests(at(folder / str(stage) / name, SAVED_AT))
            assert handed == original, f"{name}, world {world_size}, ZeRO {stage}"
            losses = torch.tensor([rank[name, stage] for rank in found], dtype=torch.float64).mean(0)
            expected = torch.tensor([rank[name] for rank in ranks], dtype=torch.float64).mean(0)
            worst = max(worst, float(((losses - expected).abs() / expected.abs().clamp(min=scale(name))).max()))
            assert worst < 1e-5, (name, world_size, stage, losses, expected)
        source = folder / str(stages[-1])
    figure(f"{len(CASES)} objectives, next losses within {worst:.1e}")
