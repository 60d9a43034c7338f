"""The engine at every ZeRO stage: the same mathematics as one plain process; nothing that is not finite is applied."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from data_pipeline.batch import Batch
from pretrain.engine.engine import Engine
from pretrain.objectives.config import ObjectiveConfig
from pretrain.objectives.contract import Objective
from pretrain.objectives.kinds import build_objective
from pretrain.objectives.mae.config import MaeConfig
from pretrain.objectives.supervised.config import SupervisedConfig
from pretrain.optim.adamw.config import AdamW
from pretrain.optim.config import Ema, OptimConfig
from pretrain.optim.lamb.config import Lamb
from pretrain.optim.lars.config import Lars
from pretrain.optim.optimizers import build_optimizer
from pretrain.optim.sgd.config import Sgd
from pretrain.recipe import recipe
from pretrain.recipe.recipe import EngineConfig
from pretrain.runtime.collectives import World, gather_objects
from pretrain.runtime.state import Progress
from tests.optim.cases import module_of, of_other_kinds
from tests.ranks import run_ranks
from tests.toy import Toy, split, toy_batch

OPTIM = AdamW(base_lr=1e-2, lr_batch=None, weight_decay=0.1, clip_norm=0.5)
STAGES = (0, 1, 2, 3)


def make_engine(
    world: World,
    stage: Any,
    accumulation: int = 1,
    *,
    objective: Objective | None = None,
    optim: OptimConfig = OPTIM,
    ema: Ema | None = None,
    options: dict[str, Any] = {},  # noqa: B006  (never written to)
    precision: Any = "fp32",
    global_size: int = 8,
    **toy: Any,
) -> Engine:
    return Engine(
        objective or Toy(**toy),
        optim,
        EngineConfig(zero_stage=stage, precision=precision, **options),
        world=world,
        device=torch.device("cpu"),
        micro_size=global_size // world.size // accumulation,
        accumulation=accumulation,
        seed=0,
        ema=ema,
    )


def whole_state(engine: Engine) -> dict[str, torch.Tensor]:
    """Every logical tensor, assembled from the fragments of all ranks."""
    whole: dict[str, torch.Tensor] = {}
    for fragments in gather_objects([(f.name, f.shape, f.start, f.data.clone()) for f in engine.state.fragments()]):
        for name, shape, start, data in fragments:
            flat = whole.setdefault(name, torch.empty(shape, dtype=data.dtype)).view(-1)
            flat[start : start + data.numel()] = data
    return whole


def step(engine: Engine, world: World, at: int, accumulation: int = 1) -> Any:
    batches = split(toy_batch(at), world.rank, world.size, accumulation)
    return engine.step(batches, Progress(at, 10, 0), 1e-2)


OPTIMS: dict[str, OptimConfig] = {
    "adamw": OPTIM,
    "adamw, layer decay": OPTIM.model_copy(update={"layer_decay": 0.5}),
    "sgd": Sgd(kind="sgd", base_lr=1e-2, nesterov=True, weight_decay=0.1, clip_norm=0.5, layer_decay=0.5),
    "lars": Lars(kind="lars", base_lr=1e-2, weight_decay=0.1),
    "lamb": Lamb(kind="lamb", base_lr=1e-2, weight_decay=0.1),
}
OPTIMS |= of_other_kinds(OPTIMS)
CASES = [(kind, stage) for kind in OPTIMS for stage in STAGES if stage == 0 or OPTIMS[kind].update == "elementwise"]


def train(world: World, accumulation: int, steps: int) -> dict[tuple[str, int], Any]:
    """By optimizer and stage."""
    found = {}
    for kind, stage in CASES:
        engine = make_engine(world, stage, accumulation, optim=OPTIMS[kind])
        results = [step(engine, world, at, accumulation) for at in range(steps)]
        found[kind, stage] = {
            "losses": [float(result.metrics["loss"]) for result in results],
            "norms": [result.grad_norm for result in results],
            "state": whole_state(engine),
            "groups": engine.state.group_values(),
        }
    return found


def plain(steps: int, optim: OptimConfig = OPTIM) -> dict[str, Any]:
    """The reference: torch alone, the whole batch at once."""
    toy = Toy()
    optimizer = build_optimizer(toy, optim)
    for group in optimizer.param_groups:
        group["lr"] = 1e-2 * group["lr_scale"]
    losses, norms = [], []
    for at in range(steps):
        loss = toy(toy_batch(at), Progress(at, 10, 0)).loss
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(toy.parameters(), optim.clip_norm or float("inf"))))
        optimizer.step()
        losses.append(loss.item())
    return {"losses": losses, "norms": norms, "state": dict(toy.named_parameters()), "groups": optimizer.param_groups}


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 1), (1, 4), (2, 1), (2, 2)])
def test_equals_one_plain_process(world_size: int, accumulation: int) -> None:
    ranks = run_ranks(train, world_size, accumulation, 4)
    for kind, optim in OPTIMS.items():
        reference = plain(4, optim)
        for stage in (stage for k, stage in CASES if k == kind):
            losses = torch.tensor([rank[kind, stage]["losses"] for rank in ranks]).mean(0)
            torch.testing.assert_close(losses, torch.tensor(reference["losses"]), rtol=1e-6, atol=1e-6)
            first = ranks[0][kind, stage]
            torch.testing.assert_close(
                torch.tensor(first["norms"]), torch.tensor(reference["norms"]), rtol=1e-5, atol=0
            )
            for name, expected in reference["state"].items():
                torch.testing.assert_close(first["state"][f"param/{name}"], expected.detach(), rtol=1e-4, atol=1e-6)
            assert [group["lr"] for group in first["groups"]] == [group["lr"] for group in reference["groups"]]
            counted = 4 if module_of(optim.kind).COUNTS_STEPS else 0
            assert {group["step"] for group in first["groups"]} == {counted}
    assert len(ranks[0]["sgd", 3]["groups"]) == 7


VIT = recipe.Model(
    name="vit_tiny_patch16_224",
    image_size=16,
    patch_size=4,
    options={"embed_dim": 24, "depth": 2, "num_heads": 3, "class_token": False, "global_pool": "avg", "fc_norm": False},
)
RESNET = recipe.Model(name="test_resnet", image_size=16)
OBJECTIVES: dict[str, tuple[recipe.Model, ObjectiveConfig]] = {
    "mae": (VIT, MaeConfig(kind="mae", decoder_width=16, decoder_depth=1, decoder_heads=2)),
    "supervised": (VIT, SupervisedConfig(kind="supervised", num_classes=3)),
    "batch norm": (RESNET, SupervisedConfig(kind="supervised", num_classes=3)),
}


def objective_and_batch(kind: str) -> tuple[Objective, Batch]:
    torch.manual_seed(0)
    objective = build_objective(*OBJECTIVES[kind])
    masks = torch.rand(8, 16).argsort(1) < 12
    return objective, Batch(
        keys=tuple("abcdefgh"),
        views=(torch.randn(8, 3, 16, 16),),
        labels=torch.randint(0, 3, (8,)),
        masks=masks if kind == "mae" else None,
    )


def part(batch: Batch, start: int, size: int) -> Batch:
    rows = slice(start, start + size)
    masks = None if batch.masks is None else batch.masks[rows]
    assert batch.labels is not None
    return Batch(batch.keys[rows], (batch.views[0][rows],), labels=batch.labels[rows], masks=masks)


def kinds(accumulation: int) -> list[str]:
    """Statistics of a batch are not made of those of its parts: a recipe that asks for that is refused."""
    return [kind for kind in OBJECTIVES if kind != "batch norm" or accumulation == 1]


def gradients(world: World, accumulation: int) -> dict[tuple[str, int], Any]:
    """(loss, gradient by name) of one step; AdamW's first moment after one step is (1 - beta1) times the gradient."""
    found = {}
    optim = OPTIM.model_copy(update={"clip_norm": None})
    for kind in kinds(accumulation):
        for stage in STAGES:
            objective, batch = objective_and_batch(kind)
            engine = make_engine(world, stage, accumulation, objective=objective, optim=optim)
            size = 8 // world.size // accumulation
            starts = range(world.rank * 8 // world.size, (world.rank + 1) * 8 // world.size, size)
            result = engine.step([part(batch, start, size) for start in starts], Progress(0, 10, 0), 1e-2)
            state = whole_state(engine)
            moments = {n.removeprefix("optim/exp_avg/"): t for n, t in state.items() if n.startswith("optim/exp_avg/")}
            found[kind, stage] = (float(result.metrics["loss"]), {n: t / (1 - 0.9) for n, t in moments.items()})
    return found


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 1), (1, 2), (2, 1)])
def test_loss_and_gradient_of_eight_samples_however_they_are_cut(world_size: int, accumulation: int) -> None:
    ranks = run_ranks(gradients, world_size, accumulation)
    for kind in kinds(accumulation):
        objective, batch = objective_and_batch(kind)
        loss = objective(batch, Progress(0, 10, 0)).loss
        loss.backward()
        expected = {name: p.grad for name, p in objective.named_parameters() if p.grad is not None}
        whole = torch.cat([g.flatten() for g in expected.values()]).norm()
        for stage in STAGES:
            mean = sum(rank[kind, stage][0] for rank in ranks) / world_size
            assert mean == pytest.approx(loss.item(), rel=1e-6)
            found = ranks[0][kind, stage][1]
            assert found.keys() == expected.keys()
            for name, gradient in expected.items():
                error = (found[name] - gradient).norm()
                assert error <= 1e-5 * max(gradient.norm(), 1e-3 * whole), (kind, stage, name)


def spoil(batches: tuple[Batch, ...], kind: str) -> tuple[Batch, ...]:
    """NaN in a pixel makes loss and gradient NaN; the keys mark a batch whose loss alone is infinite."""
    last = batches[-1]
    views = last.views[0].clone()
    if kind == "gradient":
        views[0, 0, 0, 0] = float("nan")
    keys = tuple("infinite" for _ in last.keys) if kind == "loss" else last.keys
    return (*batches[:-1], replace(last, views=(views,), keys=keys))


def skip_steps(world: World, kind: str) -> dict[int, list[bool]]:
    """Which of 4 steps were applied where one rank alone spoils the first and the third, by stage."""
    found = {}
    for stage in STAGES:
        engine = make_engine(world, stage, accumulation=2, batch_norm=True)
        found[stage] = []
        for at in range(4):
            batches = split(toy_batch(at), world.rank, world.size, 2)
            bad = at in (0, 2)
            before = whole_state(engine)
            if bad and world.rank == world.size - 1:
                batches = spoil(batches, kind)
            found[stage].append(engine.step(batches, Progress(at, 10, 0), 1e-2).applied)
            changed = any(not torch.equal(before[name], value) for name, value in whole_state(engine).items())
            assert changed != bad, (stage, at)
        assert [group["step"] for group in engine.state.group_values()] == [2, 2]
    return found


@pytest.mark.parametrize("kind", ["gradient", "loss"])
def test_a_step_that_is_not_finite_on_one_rank_changes_nothing_on_any(kind: str) -> None:
    assert run_ranks(skip_steps, 2, kind) == [{stage: [False, True, False, True] for stage in STAGES}] * 2


def dropout_losses(world: World) -> list[list[float]]:
    """Losses of 4 steps, undisturbed and with the random state disturbed in the midst, as an evaluation might.

    Every rank is given the same samples: what then differs between them is what they drop.
    """
    runs = []
    for disturbed in (False, True):
        engine = make_engine(world, 1, dropout=0.5)
        losses = []
        for at in range(4):
            if disturbed and at == 2:
                torch.manual_seed(999)
                engine.evaluate(split(toy_batch(0), 0, world.size, 1)[0], Progress(at, 10, 0))
            same = split(toy_batch(at), 0, world.size, 1)
            losses.append(float(engine.step(same, Progress(at, 10, 0), 1e-2).metrics["loss"]))
        runs.append(losses)
    return runs


def test_dropout_is_keyed_by_step_and_rank() -> None:
    (quiet, disturbed), (other_rank, _) = run_ranks(dropout_losses, 2)
    assert quiet == disturbed
    assert all(mine != other for mine, other in zip(quiet, other_rank, strict=True))


def autocast_state(world: World) -> dict[int, Any]:
    found = {}
    for stage in STAGES:
        engine = make_engine(world, stage, precision="bf16")
        start = whole_state(engine)
        losses = [float(step(engine, world, at).metrics["loss"]) for at in range(3)]
        dtypes = {str(t.dtype) for t in whole_state(engine).values()}
        found[stage] = {"losses": losses, "start": start, "dtypes": dtypes}
    return found


def test_bf16_keeps_exact_fp32_masters() -> None:
    first, second = run_ranks(autocast_state, 2)
    reference = torch.tensor(plain(3)["losses"])
    for stage in STAGES:
        for name, value in Toy().named_parameters():
            assert torch.equal(first[stage]["start"][f"param/{name}"], value.detach())
        assert first[stage]["dtypes"] == {"torch.float32"}
        losses = (torch.tensor(first[stage]["losses"]) + torch.tensor(second[stage]["losses"])) / 2
        torch.testing.assert_close(losses, reference, rtol=0.02, atol=0)
        assert not torch.equal(losses, reference), "autocast changed nothing: was it on?"


def materialized(world: World) -> dict[int, dict[str, torch.Tensor]]:
    found = {}
    for stage in (2, 3):
        engine = make_engine(world, stage)
        step(engine, world, 0)
        found[stage] = engine.materialize(engine.objective.encoder)
        expected = whole_state(engine)
        for name, value in found[stage].items():
            assert torch.equal(value, expected[f"param/encoder.{name}"])
        step(engine, world, 1)
    return found


def test_materialize_gives_whole_weights_on_every_rank() -> None:
    shapes = {name: t.shape for name, t in Toy().encoder.state_dict().items()}
    for rank in run_ranks(materialized, 2):
        for whole in rank.values():
            assert {name: t.shape for name, t in whole.items()} == shapes
