"""The engine at every ZeRO stage: the same mathematics as one plain process, and nothing non-finite ever applied."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from data_pipeline.batch import Batch
from pretrain.collectives import World
from pretrain.engine import Engine
from pretrain.recipe import AdamW, EngineConfig
from pretrain.state import Progress
from tests.ranks import run_ranks
from tests.toy import Toy, split, toy_batch

OPTIM = AdamW(base_lr=1e-2, lr_batch=None, weight_decay=0.1, clip_norm=0.5)


def make_engine(
    world: World, stage: Any, accumulation: int = 1, size: int = 8, precision: Any = "fp32", **toy: Any
) -> Engine:
    return Engine(
        Toy(**toy),
        OPTIM,
        EngineConfig(zero_stage=stage, precision=precision),
        world=world,
        device=torch.device("cpu"),
        micro_size=size // world.size // accumulation,
        accumulation=accumulation,
        seed=0,
    )


def whole_state(engine: Engine) -> dict[str, torch.Tensor]:
    """Every logical tensor, assembled from the fragments of all ranks."""
    from pretrain.collectives import gather_objects

    whole: dict[str, torch.Tensor] = {}
    for fragments in gather_objects([(f.name, f.shape, f.start, f.data.clone()) for f in engine.fragments()]):
        for name, shape, start, data in fragments:  # type: ignore[attr-defined]
            flat = whole.setdefault(name, torch.empty(shape, dtype=data.dtype)).view(-1)
            flat[start : start + data.numel()] = data
    return whole


def train(world: World, stage: int, accumulation: int, steps: int, toy: dict[str, Any]) -> dict[str, Any]:
    engine = make_engine(world, stage, accumulation, **toy)
    losses, norms = [], []
    for step in range(steps):
        result = engine.step(split(toy_batch(step), world.rank, world.size, accumulation), Progress(step, 10, 0), 1e-2)
        losses.append(float(result.metrics["loss"]))
        norms.append(result.grad_norm)
    return {"losses": losses, "norms": norms, "state": whole_state(engine), "groups": engine.group_values()}


def plain(steps: int) -> dict[str, Any]:
    """The reference: torch alone, the whole batch at once."""
    toy = Toy()
    decay = [p for p in toy.parameters() if p.ndim > 1]
    rest = [p for p in toy.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
        lr=1e-2, betas=OPTIM.betas, eps=OPTIM.eps,
    )  # fmt: skip
    losses, norms = [], []
    for step in range(steps):
        loss = toy(toy_batch(step), Progress(step, 10, 0)).loss
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(toy.parameters(), 0.5)))
        optimizer.step()
        losses.append(float(loss))
    return {"losses": losses, "norms": norms, "state": dict(toy.named_parameters())}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 1), (1, 4), (2, 1), (2, 2)])
def test_equals_one_plain_process(stage: int, world_size: int, accumulation: int) -> None:
    ranks = run_ranks(train, world_size, stage, accumulation, 4, {})
    reference = plain(4)
    losses = torch.tensor([rank["losses"] for rank in ranks]).mean(0)
    torch.testing.assert_close(losses, torch.tensor(reference["losses"]), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.tensor(ranks[0]["norms"]), torch.tensor(reference["norms"]), rtol=1e-5, atol=0)
    for name, expected in reference["state"].items():
        torch.testing.assert_close(ranks[0]["state"][f"param/{name}"], expected.detach(), rtol=1e-4, atol=1e-6)
    assert [group["step"] for group in ranks[0]["groups"]] == [4, 4]


def spoil(batches: tuple[Batch, ...], kind: str) -> tuple[Batch, ...]:
    """NaN in a pixel makes loss and gradient NaN; the keys mark a batch whose loss alone is infinite."""
    last = batches[-1]
    views = last.views[0].clone()
    if kind == "gradient":
        views[0, 0, 0, 0] = float("nan")
    keys = tuple("infinite" for _ in last.keys) if kind == "loss" else last.keys
    return (*batches[:-1], replace(last, views=(views,), keys=keys))


def skip_steps(world: World, stage: int, kind: str) -> list[bool]:
    engine = make_engine(world, stage, accumulation=2)
    applied = []
    for step in range(4):
        batches = split(toy_batch(step), world.rank, world.size, 2)
        bad = step in (0, 2)
        before = whole_state(engine)
        if bad and world.rank == world.size - 1:  # one rank alone
            batches = spoil(batches, kind)
        result = engine.step(batches, Progress(step, 10, 0), 1e-2)
        applied.append(result.applied)
        changed = any(not torch.equal(before[name], value) for name, value in whole_state(engine).items())
        assert changed != bad
    assert [group["step"] for group in engine.group_values()] == [2, 2]
    return applied


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("kind", ["gradient", "loss"])
def test_a_step_that_is_not_finite_on_one_rank_changes_nothing_on_any(stage: int, kind: str) -> None:
    assert run_ranks(skip_steps, 2, stage, kind) == [[False, True, False, True]] * 2


def dropout_losses(world: World, stage: int, again_at: int) -> list[float]:
    """Losses of 4 steps; from `again_at` on, the random state was disturbed as an evaluation might."""
    engine = make_engine(world, stage, dropout=0.5)
    losses = []
    for step in range(4):
        if step == again_at:
            torch.manual_seed(999)
            engine.evaluate(split(toy_batch(0), world.rank, world.size, 1)[0], Progress(step, 10, 0))
        batches = split(toy_batch(step), world.rank, world.size, 1)
        losses.append(float(engine.step(batches, Progress(step, 10, 0), 1e-2).metrics["loss"]))
    return losses


def test_dropout_is_keyed_by_step_and_rank() -> None:
    quiet, disturbed = run_ranks(dropout_losses, 2, 1, -1), run_ranks(dropout_losses, 2, 1, 2)
    assert quiet == disturbed
    assert quiet[0] != quiet[1]


def autocast_state(world: World, stage: int) -> dict[str, Any]:
    engine = make_engine(world, stage, precision="bf16")
    start = whole_state(engine)
    losses = []
    for step in range(3):
        batches = split(toy_batch(step), world.rank, world.size, 1)
        losses.append(float(engine.step(batches, Progress(step, 10, 0), 1e-2).metrics["loss"]))
    return {"losses": losses, "start": start, "dtypes": {str(t.dtype) for t in whole_state(engine).values()}}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bf16_keeps_exact_fp32_masters(stage: int) -> None:
    first, second = run_ranks(autocast_state, 2, stage)
    for name, value in Toy().named_parameters():
        assert torch.equal(first["start"][f"param/{name}"], value.detach())
    assert first["dtypes"] == {"torch.float32"}
    losses = (torch.tensor(first["losses"]) + torch.tensor(second["losses"])) / 2
    reference = torch.tensor(plain(3)["losses"])
    torch.testing.assert_close(losses, reference, rtol=0.02, atol=0)
    assert not torch.equal(losses, reference), "autocast changed nothing: was it on?"


def materialized(world: World, stage: int) -> dict[str, torch.Tensor]:
    engine = make_engine(world, stage)
    engine.step(split(toy_batch(0), world.rank, world.size, 1), Progress(0, 10, 0), 1e-2)
    whole = engine.materialize(engine.objective.encoder)
    expected = whole_state(engine)
    assert all(torch.equal(value, expected[f"param/encoder.{name}"]) for name, value in whole.items())
    engine.step(split(toy_batch(1), world.rank, world.size, 1), Progress(1, 10, 0), 1e-2)
    return whole


@pytest.mark.parametrize("stage", [2, 3])
def test_materialize_gives_whole_weights(stage: int) -> None:
    for whole in run_ranks(materialized, 2, stage):
        assert {name: tuple(t.shape) for name, t in whole.items()} == {
            name: tuple(t.shape) for name, t in Toy().encoder.state_dict().items()
        }
