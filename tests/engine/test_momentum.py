"""BYOL and SimSiam in the engine: however the batch is cut, at every stage, from checkpoint to checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from data_pipeline.batch import Batch
from pretrain.checkpoints import checkpoint
from pretrain.checkpoints.start import _initialize
from pretrain.engine.engine import Engine
from pretrain.objectives.byol.config import ByolConfig
from pretrain.objectives.config import ObjectiveConfig
from pretrain.objectives.contract import Objective
from pretrain.objectives.kinds import build_objective
from pretrain.objectives.simsiam.config import SimSiamConfig
from pretrain.optim.config import Cosine, OptimConfig
from pretrain.optim.schedules import constant_learning_rate, learning_rate
from pretrain.optim.sgd.config import Sgd
from pretrain.recipe import recipe
from pretrain.runtime.collectives import World, barrier
from pretrain.runtime.state import Progress, RunState
from tests.checkpoints.test_checkpoint import save
from tests.engine.test_engine import OPTIM, STAGES, make_engine, whole_state
from tests.ranks import run_ranks

SIZE = 12  # samples of a global batch: 1, 2 and 3 ranks divide it
VIT = recipe.Model(
    name="vit_tiny_patch16_224", image_size=16, patch_size=4,
    options={"embed_dim": 12, "depth": 1, "num_heads": 3, "class_token": False, "global_pool": "avg", "fc_norm": False},
)  # fmt: skip
RESNET = recipe.Model(name="test_resnet", image_size=16)
# At 16 pixels its last convolution, of stride 2, sees an image of 1 x 1, and of that oneDNN's bf16 gradient of the
# weights is memory that nobody wrote (torch 2.15 with AVX-512 and no AMX). At 64 it sees 4 x 4.
RESNET_IN_BF16 = RESNET.model_copy(update={"image_size": 64})
BYOL = ByolConfig(kind="byol", hidden_width=15, out_width=7, base_decay=0.8)
SIMSIAM = SimSiamConfig(kind="simsiam", projector_width=15, predictor_width=7)
KINDS: dict[str, tuple[recipe.Model, ObjectiveConfig]] = {
    "byol": (RESNET, BYOL),
    "simsiam": (RESNET, SIMSIAM),
    "byol in bf16": (RESNET_IN_BF16, BYOL),
    "slow byol": (VIT, BYOL.model_copy(update={"base_decay": 0.9999})),
}
PAPERS = ("byol", "simsiam")
SGD = Sgd(kind="sgd", base_lr=1e-2, weight_decay=1e-4)


def built(kind: str, seed: int = 0) -> Objective:
    torch.manual_seed(seed)
    return build_objective(*KINDS[kind])


def batch_at(step: int, kind: str = "byol") -> Batch:
    generator = torch.Generator().manual_seed(step)
    size = KINDS[kind][0].image_size
    views = tuple(torch.randn(SIZE, 3, size, size, generator=generator) for _ in range(2))
    return Batch(tuple(f"{step}-{i}" for i in range(SIZE)), views)


def share(batch: Batch, world: World) -> tuple[Batch]:
    size = len(batch) // world.size
    rows = slice(world.rank * size, (world.rank + 1) * size)
    return (Batch(batch.keys[rows], tuple(view[rows] for view in batch.views)),)


def make(
    world: World, stage: int, kind: str, seed: int = 0, optim: OptimConfig = OPTIM, precision: str = "fp32"
) -> Engine:
    return make_engine(world, stage, objective=built(kind, seed), optim=optim, global_size=SIZE, precision=precision)


def step(engine: Engine, world: World, at: int) -> float:
    result = engine.step(share(batch_at(at), world), Progress(at, 20, 0), 1e-2)
    assert result.applied
    return float(result.metrics["loss"])


def gradients(world: World) -> dict[tuple[str, int], Any]:
    optim = OPTIM.model_copy(update={"clip_norm": None})
    found = {}
    for kind in PAPERS:
        for stage in STAGES:
            engine = make(world, stage, kind, optim=optim)
            result = engine.step(share(batch_at(0), world), Progress(0, 20, 0), 1e-2)
            moments = {n: t / (1 - 0.9) for n, t in whole_state(engine).items() if n.startswith("optim/exp_avg/")}
            metrics = {name: float(value) for name, value in result.metrics.items()}
            found[kind, stage] = metrics, {n.removeprefix("optim/exp_avg/"): t for n, t in moments.items()}
    return found


@pytest.mark.parametrize("world_size", [1, 2])
def test_loss_and_gradient_of_a_batch_however_many_ranks_share_it(world_size: int) -> None:
    """Statistics of batch norm, of the target's too, are those of the whole batch; a target gets no gradient."""
    ranks = run_ranks(gradients, world_size)
    for kind in PAPERS:
        objective = built(kind)
        output = objective(batch_at(0), Progress(0, 20, 0))
        output.loss.backward()
        expected = {name: p.grad for name, p in objective.named_parameters() if p.grad is not None}
        whole = torch.cat([g.flatten() for g in expected.values()]).norm()
        for stage in STAGES:
            losses = [rank[kind, stage][0]["loss"] for rank in ranks]
            assert sum(losses) / world_size == pytest.approx(output.loss.item(), rel=1e-6, abs=1e-6)
            for rank in ranks:
                std = output.metrics["embedding_std"].item()
                assert rank[kind, stage][0]["embedding_std"] == pytest.approx(std, rel=1e-5)
            found = ranks[0][kind, stage][1]
            assert found.keys() == expected.keys()
            for name, gradient in expected.items():
                error = (found[name] - gradient).norm()
                assert error <= 1e-5 * max(gradient.norm(), 1e-3 * whole), (kind, stage, name)


def weights(engine: Engine) -> dict[str, Tensor]:
    """Of the parameters, in fp64: whole below stage 3, there this rank's pieces, cut alike for target and online."""
    if engine.stage < 3:
        return {name: p.detach().double() for name, p in engine.objective.named_parameters()}
    kept = {f.name: f.data.double() for f in engine.state.fragments()}
    return {name.removeprefix("param/"): value for name, value in kept.items() if name.startswith("param/")}


def followed(
    world: World, num_steps: int, total_steps: int, kind: str, stages: tuple[int, ...] = STAGES
) -> dict[int, dict[str, float]]:
    """The target against an fp64 recurrence over the online weights, and the next forward pass, by stage; bf16."""
    found = {}
    for stage in stages:
        engine = make(world, stage, kind, optim=SGD, precision="bf16")
        expected = start = {n: w for n, w in weights(engine).items() if n.startswith("target.")}
        for at in range(num_steps):
            progress = Progress(at, total_steps, 0)
            result = engine.step(share(batch_at(at % 7, kind), world), progress, 1e-2)
            assert result.applied, (stage, at, result.grad_norm)
            decay = engine.objective.teachers(progress)[0].decay
            online = weights(engine)
            expected = {n: decay * w + (1 - decay) * online[n.removeprefix("target.")] for n, w in expected.items()}
        now = weights(engine)
        errors = [float((now[n] - w).norm() / w.norm().clamp(min=1e-3)) for n, w in expected.items() if w.numel()]
        moved = [float((now[n] - w).norm()) for n, w in start.items()]
        found[stage] = {"error": max(errors), "moved": max(moved), "numel": sum(w.numel() for w in now.values())}
        found[stage] |= next_pass(engine, world, kind, stale=start if stage == 0 else None)
    return found


def next_pass(engine: Engine, world: World, kind: str, stale: dict[str, Tensor] | None) -> dict[str, float]:
    """The loss that the engine computes next, and that of a plain objective with the target as it is now."""
    state = {name.split("/", 1)[1]: t for name, t in whole_state(engine).items() if name[0] in "pb"}
    plain = built(kind, seed=5).eval()
    plain.load_state_dict(state)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        mine = share(batch_at(50, kind), world)[0]
        fresh = float(plain(mine, Progress(0, 1, 0)).loss)
        values = {"next": float(engine.evaluate(mine, Progress(0, 1, 0)).loss), "expected": fresh}
        if stale is not None:
            plain.load_state_dict({**state, **{name: value.float() for name, value in stale.items()}})
            values["stale"] = float(plain(mine, Progress(0, 1, 0)).loss)
    return values


def check_followed(ranks: list[dict[int, dict[str, float]]], error: float) -> None:
    for rank in ranks:
        for stage, found in rank.items():
            assert found["error"] < error, (stage, found)
            assert found["moved"] > 1e-4, (stage, found)
            assert found["next"] == pytest.approx(found["expected"], rel=2e-3), (stage, found)


def test_the_target_is_that_of_fp64_and_the_next_pass_uses_it() -> None:
    ranks = run_ranks(followed, 2, 6, 20, "byol in bf16")
    check_followed(ranks, 1e-6)
    assert all(abs(rank[0]["stale"] - rank[0]["expected"]) > 1e-2 for rank in ranks)


def train_and_save(world: World, folder: Path, stage: int) -> list[float]:
    engine = make(world, stage, "byol")
    for at in range(3):
        step(engine, world, at)
    save(folder, engine, RunState(Progress(3, 20, 3 * SIZE), cursor=3 * SIZE), world)
    return [step(engine, world, at) for at in range(3, 6)]


def load_and_save(world: World, source: Path, folder: Path, stages: tuple[int, ...]) -> list[list[float]]:
    losses = []
    for stage in stages:
        engine = make(world, stage, "byol", seed=7)  # other weights, to be replaced entirely
        step(engine, world, 50)
        state = checkpoint.load(checkpoint.open_checkpoint(source, world), engine.state)
        save(folder / str(stage), engine, state, world)
        barrier()
        losses.append([step(engine, world, at) for at in range(3, 6)])
    return losses


def test_any_world_size_and_stage_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    """From (2, ZeRO 2): equal by hash and in the next losses wherever it is loaded; to the bit where it was saved."""
    expected = run_ranks(train_and_save, 2, tmp_path / "start", 2)
    source = tmp_path / "start" / checkpoint.folder_name(3)
    original = checkpoint.digests(source)
    assert any("buffer/" in name and "running_mean" in name for name in original)
    assert {"param/target.projector.0.weight", "buffer/target.projector.1.running_mean"} <= original.keys()
    assert not any(name.startswith("optim/") and "target" in name for name in original)
    means = torch.tensor(expected).mean(0)
    for world_size, stages in {1: (3,), 2: (2, 1), 3: (0, 3)}.items():
        folder = tmp_path / str(world_size)
        ranks = run_ranks(load_and_save, world_size, source, folder, stages)
        for i, stage in enumerate(stages):
            assert checkpoint.digests(folder / str(stage) / checkpoint.folder_name(3)) == original, (world_size, stage)
            losses = [rank[i] for rank in ranks]
            torch.testing.assert_close(torch.tensor(losses).mean(0), means, rtol=1e-5, atol=1e-6)
            if (world_size, stage) == (2, 2):
                assert losses == expected


def rates(world: World) -> list[dict[str, float]]:
    """Learning rates by group, and how far each weight moved, where all but the undecayed rate is 0."""
    engine = make(world, 1, "simsiam", optim=SGD.model_copy(update={"layer_decay": 0.5, "weight_decay": 0.0}))
    before = whole_state(engine)
    engine.step(share(batch_at(0), world), Progress(0, 20, 0), 0.0, 0.5)
    after = whole_state(engine)
    moved = {n: float((after[n] - before[n]).norm()) for n in before if n.startswith("param/")}
    return [{str(group["name"]): float(group["lr"]) for group in engine.state.group_values()}, moved]


def test_the_predictor_of_simsiam_takes_the_rate_without_decay() -> None:
    groups, moved = run_ranks(rates, 1)[0]
    undecayed = {name: lr for name, lr in groups.items() if name.startswith("undecayed_")}
    assert set(undecayed.values()) == {0.5}
    assert {lr for name, lr in groups.items() if name not in undecayed} == {0.0}
    for name, distance in moved.items():
        assert (distance > 0) == name.startswith("param/predictor."), name


def test_both_rates_warm_up_alike_and_one_stays() -> None:
    cosine = Cosine(steps=20)
    for at in range(21):
        progress = Progress(at, 20, 0)
        decayed = learning_rate(progress, cosine, peak_lr=0.1, warmup_steps=4)
        fixed = constant_learning_rate(progress, peak_lr=0.1, warmup_steps=4)
        assert fixed == pytest.approx(0.1 * min(1, (at + 1) / 5))
        assert decayed == fixed if at <= 4 else decayed < fixed


def test_weights_of_init_from_are_those_that_the_target_starts_from(tmp_path: Path) -> None:
    for seed, kind in ((3, "byol"), (4, "simsiam")):
        given = built(kind, seed)
        with torch.no_grad():
            for p in given.parameters():
                p.add_(torch.randn_like(p), alpha=0.1)
        file = tmp_path / f"{kind}.safetensors"
        state = {name.removeprefix("encoder."): t for name, t in given.state_dict().items() if name[:2] == "en"}
        save_file(state, file)
        objective = built("byol")
        notes = _initialize(objective, file, World(), ignore=())
        found = objective.state_dict()
        for name, value in state.items():
            assert torch.equal(found[f"encoder.{name}"], value)
        followers = [name for name in found if name.startswith("target.")]
        assert followers
        for name in followers:
            assert torch.equal(found[name], found[name.removeprefix("target.")]), name
        assert notes[-1] == "as the weights that they follow: target.encoder, target.projector"
        assert not any("target" in note for note in notes[:-1])
