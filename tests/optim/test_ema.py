"""Averages of weights against fp64 recurrences, sharded at every stage, in the checkpoint, and what is exported."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data_pipeline.batch import Batch
from pretrain.checkpoints import checkpoint
from pretrain.engine.engine import Engine
from pretrain.objectives.contract import LossOutput, Teacher
from pretrain.optim.averages import decay_at, follow
from pretrain.optim.config import Ema
from pretrain.optim.optimizers import build_optimizer
from pretrain.runtime.collectives import World
from pretrain.runtime.state import Progress, RunState
from tests.checkpoints.test_checkpoint import save
from tests.engine.test_engine import OPTIM, STAGES, make_engine, spoil, step, whole_state
from tests.ranks import run_ranks
from tests.toy import Toy, split, toy_batch


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm().clamp(min=1e-3))


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.5, 0.996, 0.9999])
def test_updates_below_a_step_of_fp32_are_not_lost(decay: float) -> None:
    """Of scales near 1, on either side, that follow weights nearby, against fp64 over 2,000 updates."""
    generator = torch.Generator().manual_seed(0)
    average = 1 + 1e-3 * torch.randn(1000, generator=generator)
    still, expected = torch.tensor([1.0, 0.0, -0.3, 2.0**-130]), average.double()
    unmoved = still.clone()
    near = average + 1e-4
    for number in range(1, 2001):
        weight = near + 1e-5 * torch.randn(1000, generator=generator)
        follow([average, unmoved], [weight, still], decay, number)
        expected = decay * expected + (1 - decay) * weight.double()
    assert torch.equal(unmoved, still)
    assert (average - expected).norm() / expected.norm() < 1e-6  # a lerp is 2e-5 off at 0.9999
    assert (average - expected).mean().abs() < 1e-7  # and all of it in one direction


def kept(engine: Engine, kind: str) -> dict[str, Tensor]:
    """This rank's pieces of parameters and running statistics, or of their averages, by name."""
    kinds = ("param/", "buffer/") if kind == "param/" else (kind,)
    return {
        f.name.split("/", 1)[1]: f.data.double()  # a copy
        for f in engine.state.fragments()
        if f.name.startswith(kinds) and f.data.is_floating_point()
    }


def averaged(world: World, config: Ema, steps: int) -> dict[int, Any]:
    """Against fp64, after `steps` steps in bf16 of which the third is not applied, by stage."""
    found = {}
    for stage in STAGES:
        engine = make_engine(world, stage, precision="bf16", ema=config, batch_norm=True)
        start = expected = kept(engine, "param/")
        applied = 0
        for at in range(steps):
            batches = split(toy_batch(at), world.rank, world.size, 1)
            if at == 2 and world.rank == 0:
                batches = spoil(batches, "loss")
            if not engine.step(batches, Progress(applied, steps, 0), 1e-2).applied:
                continue
            applied += 1
            decay, weights = decay_at(config, applied), kept(engine, "param/")
            expected = {name: decay * value + (1 - decay) * weights[name] for name, value in expected.items()}
        assert applied == steps - 1
        averages = kept(engine, "ema/")
        found[stage] = {
            "errors": {name: error(value, expected[name]) for name, value in averages.items()},
            "moved": max(error(value, start[name]) for name, value in averages.items()),
            "all": averages.keys() == expected.keys(),
            "numel": sum(value.numel() for value in averages.values()),
            "dtypes": {f.data.dtype for f in engine.state.fragments() if f.name.startswith("ema/")},
            "state": whole_state(engine),
            "exported": engine.materialize(engine.objective.encoder),
            "raw": engine.materialize(engine.objective.encoder, averaged=False),
        }
    return found


def test_the_average_is_that_of_fp64_and_is_what_is_exported() -> None:
    statistics = 2 * 11  # which every rank keeps whole
    numel = sum(p.numel() for p in Toy(batch_norm=True).parameters())
    ranks = run_ranks(averaged, 2, Ema(decay=0.8), 9)
    for stage in STAGES:
        assert sum(rank[stage]["numel"] for rank in ranks) == numel * (2 if stage == 0 else 1) + 2 * statistics
        for rank in ranks:
            found, state = rank[stage], rank[stage]["state"]
            assert found["all"]
            assert found["dtypes"] == {torch.float32}
            assert max(found["errors"].values()) < 1e-6
            assert found["moved"] > 1e-2
            for name, value in found["exported"].items():
                has_average = f"ema/encoder.{name}" in state
                assert has_average == (name != "4.num_batches_tracked")
                raw = "param" if f"param/encoder.{name}" in state else "buffer"
                assert torch.equal(value, state[f"{'ema' if has_average else raw}/encoder.{name}"])
                assert torch.equal(found["raw"][name], state[f"{raw}/encoder.{name}"])


def test_decay_warms_up_and_stays() -> None:
    config = Ema(decay=0.99)
    decays = [decay_at(config, step) for step in range(1, 2000)]
    assert decays[0] == pytest.approx(2 / 11)
    assert decays == sorted(decays)
    assert decays[-1] == 0.99
    assert decay_at(Ema(decay=0.99, warmup=False), 1) == 0.99


class Student(Toy):
    """Learns to agree with a slower copy of itself, beside its labels."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.teacher = copy.deepcopy(self.encoder).requires_grad_(False)

    def forward(self, batch: Batch, progress: Progress) -> LossOutput:
        loss = super().forward(batch, progress).loss
        difference = self.encoder(batch.views[0]) - self.teacher(batch.views[0])
        return LossOutput(loss + difference.float().square().mean())

    def teachers(self, progress: Progress) -> list[Teacher]:
        return [Teacher(self.teacher, self.encoder, 0.5 + 0.04 * progress.step)]


def taught(world: World, folder: Path) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of 2 steps at each stage, each from the checkpoint of the one before; at the end the whole state."""
    losses = []
    source: Path | None = None
    for stage in STAGES:
        engine = make_engine(world, stage, objective=Student(seed=stage))
        progress = Progress(0, 10, 0)
        if source is not None:
            step(engine, world, 50)  # what was gathered before must not outlive the loading
            progress = checkpoint.load(checkpoint.open_checkpoint(source, world), engine.state).progress
        for _ in range(2):
            losses.append(float(step(engine, world, progress.step).metrics["loss"]))
            progress = progress.advance(8)
        save(folder, engine, RunState(progress), world)
        source = folder / checkpoint.folder_name(progress.step)
    return losses, whole_state(engine)


def plain_teacher(steps: int) -> tuple[list[float], dict[str, Tensor]]:
    student = Student()
    optimizer = build_optimizer(student, OPTIM)
    losses = []
    for at in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2
        loss = student(toy_batch(at), Progress(at, 10, 0)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 0.5)
        optimizer.step()
        decay = student.teachers(Progress(at, 10, 0))[0].decay
        with torch.no_grad():
            for slow, fast in zip(student.teacher.parameters(), student.encoder.parameters(), strict=True):
                slow.copy_(decay * slow + (1 - decay) * fast)
        losses.append(loss.item())
    return losses, student.state_dict()


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_teacher_follows_at_every_stage_and_is_in_the_checkpoint(tmp_path: Path, world_size: int) -> None:
    """Handed on from stage to stage it is where one plain process leads in one go."""
    ranks = run_ranks(taught, world_size, tmp_path)
    losses, state = plain_teacher(8)
    torch.testing.assert_close(
        torch.tensor([rank[0] for rank in ranks]).mean(0), torch.tensor(losses), rtol=1e-5, atol=0
    )
    for name, value in state.items():
        torch.testing.assert_close(ranks[0][1][f"param/{name}"], value, rtol=1e-4, atol=1e-6)
    assert not any(name.startswith("optim/") and "teacher" in name for name in ranks[0][1])
