"""A global batch gives the same loss and gradient however ranks and micro-batches share it, at any ZeRO stage."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from data_pipeline.batch import Batch
from pretrain.engine.engine import Engine
from pretrain.optim.adamw.config import AdamW
from pretrain.optim.config import OptimConfig
from pretrain.optim.sgd.config import Sgd
from pretrain.preflight import cannot_accumulate
from pretrain.runtime.collectives import World
from pretrain.runtime.state import Progress
from tests.combinations import drawn
from tests.contracts.test_objectives import CASES
from tests.engine.test_engine import STAGES, make_engine, whole_state
from tests.objectives.cases import batch_for
from tests.ranks import run_ranks

ADAMW = AdamW(base_lr=1e-2, weight_decay=0.1)
SGD = Sgd(kind="sgd", base_lr=1e-2, weight_decay=0)
GLOBAL_SIZE = 12
CUTS = [(1, 1), (1, 2), (2, 1), (2, 2)]  # (ranks, micro-batches of a rank)


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


def scale(name: str) -> float:
    """Of what a loss is a mean of: cosines may cancel, and their rounding does not."""
    return 1.0 if name.startswith(("byol", "simsiam")) else 0.1


def accumulations(name: str) -> tuple[int, ...]:
    """Numbers of micro-batches that a recipe of this case may ask for."""
    return (1,) if cannot_accumulate(CASES[name].build()) else (1, 2)


Gradients = tuple[float, dict[str, Tensor]]  # (loss, gradient by name)
Tried = tuple[str, int, int]  # (case, ZeRO stage, micro-batches of a rank)


def gradients(world: World, tried: list[Tried]) -> dict[Tried, Gradients]:
    """What the engine makes of one step; SGD's momentum after one step is the gradient."""
    found = {}
    for name, stage, accumulation in tried:
        engine = engine_of(world, name, stage, accumulation, SGD)
        batch = batch_for(engine.objective.needs, GLOBAL_SIZE)
        result = engine.step(share(batch, world, accumulation), Progress(3, 10, 24), 1e-2)
        prefix = "optim/momentum_buffer/"
        momenta = {n.removeprefix(prefix): t for n, t in whole_state(engine).items() if n.startswith(prefix)}
        found[name, stage, accumulation] = float(result.metrics["loss"]), momenta
    return found


def plain(name: str) -> Gradients:
    """What torch alone makes of the whole batch, in one process."""
    objective = CASES[name].build().train()
    loss = objective(batch_for(objective.needs, GLOBAL_SIZE), Progress(3, 10, 24)).loss
    loss.backward()
    return loss.item(), {n: p.grad for n, p in objective.named_parameters() if p.grad is not None}


def check_gradients(world_size: int, tried: list[Tried]) -> None:
    ranks = run_ranks(gradients, world_size, tried)
    references = {name: plain(name) for name in {name for name, *_ in tried}}
    for key in tried:
        name, found = key[0], ranks[0][key][1]
        loss, expected = references[name]
        mean = sum(rank[key][0] for rank in ranks) / world_size
        assert mean == pytest.approx(loss, rel=1e-6, abs=1e-6 * scale(name)), key
        assert found.keys() == expected.keys()
        whole = torch.cat([gradient.flatten() for gradient in expected.values()]).norm()
        for parameter, gradient in expected.items():
            error = (found[parameter] - gradient).norm()
            # A bias before batch norm has none but rounding, which is that of the whole: two fp32 steps of it.
            bound = max(1e-5 * gradient.norm(), 2 * torch.finfo(torch.float32).eps * whole)
            assert error <= bound, (key, parameter)


def combinations() -> dict[str, tuple[int, tuple[int, int]]]:
    """(stage, cut) of each case; those that cannot accumulate are drawn apart, from the cuts that they allow."""
    found: dict[str, Any] = {}
    for allowed in ((1,), (1, 2)):
        names = [name for name in CASES if accumulations(name) == allowed]
        found |= drawn(names, STAGES, [cut for cut in CUTS if cut[1] in allowed])
    return found


COMBINATIONS = combinations()


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_each_objective_gives_the_gradient_of_the_whole_batch(world_size: int) -> None:
    """At a stage and cut drawn from its name; tests/drills/test_every_objective.py has all of them."""
    tried = [(name, stage, cut[1]) for name, (stage, cut) in COMBINATIONS.items() if cut[0] == world_size]
    check_gradients(world_size, tried)


def test_all_stages_and_cuts_are_among_those_drawn() -> None:
    found = set(COMBINATIONS.values())
    assert {(stage, cut[0]) for stage, cut in found} == {(stage, ranks) for stage in STAGES for ranks in (1, 2)}
    assert {cut for _, cut in found} == set(CUTS)
