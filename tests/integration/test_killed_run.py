"""A command's run is killed between two checkpoints and goes on: to the bit, probe and books included."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path

import psutil
import pytest

from data_pipeline.durable import read_lines
from pretrain.checkpoints.checkpoint import complete_checkpoints, digests
from pretrain.monitoring.goodput import read_goodput
from pretrain.monitoring.timeline import FILE_NAME
from tests.commands import Done, begun, pretrain, program
from tests.gate import Gate, behind, until
from tests.runs import logged, losses, train, write_recipe
from tests.shards import write_shards

pytestmark = pytest.mark.slow

STEPS, SAVED, KILLED = 16, 6, 10  # the kill is neither at a checkpoint nor at the end of an epoch, of 12.5 steps


@dataclass(frozen=True)
class Killed:
    """A run that was killed and gone on with, the same run without that, and what was noted on the way."""

    out: Path
    whole: Path
    recipe: Path
    first: Done
    second: Done
    submitted: float
    killed: float
    ended: float


def ranks_of(launcher: int) -> list[int]:
    return [child.pid for child in psutil.Process(launcher).children()]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Killed:
    folder = tmp_path_factory.mktemp("killed")
    shards, val = write_shards(folder / "train"), write_shards(folder / "val", 27)  # no multiple of anything
    recipe = write_recipe(
        folder / "r.yaml", shards,
        data={"train": str(shards), "val": str(val), "read_streams": 3, "shuffle_window": 16},
        schedule={"steps": STEPS, "warmup": 0.1}, online_probe={"lr": 0.1}, validation={"every_epochs": 0.4},
        checkpoint={"every_steps": SAVED, "keep_last": 9},
    )  # fmt: skip
    train(recipe, folder / "whole", 2)
    out, gate, submitted = folder / "run", Gate(folder / "gate"), time.time()
    (out / "job").mkdir(parents=True)
    (out / "job" / "submitted.json").write_text(json.dumps({"submitted_at": submitted}))
    gate.open(KILLED)
    words = ("train", recipe, "--nproc", 2, "--out", out)
    with begun(partial(behind, gate, program("launch.cli", *words))) as command:
        until(
            lambda: max(losses(out), default=0) == KILLED and complete_checkpoints(out / "checkpoints"),
            meanwhile=command.running, said=command.said,
        )  # fmt: skip
        ranks = ranks_of(command.pid)
        assert len(ranks) == 2
        for rank in ranks:
            os.kill(rank, signal.SIGKILL)
        first, killed = command.wait(60), time.time()
    events = [{"event": "start", "at": submitted, "attempt": 0}, {"event": "end", "at": killed, "attempt": 0}]
    (out / "job" / "attempts.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    second = pretrain(*words)
    return Killed(out, folder / "whole", recipe, first, second, submitted, killed, time.time())


def test_the_launcher_says_that_its_ranks_were_killed(run: Killed) -> None:
    assert run.first.status == 128 + signal.SIGKILL
    assert "was killed by SIGKILL" in run.first.stderr


def test_every_loss_is_that_of_the_uninterrupted_run(run: Killed) -> None:
    assert "from scratch" not in run.second.stdout
    assert sorted(losses(run.out)) == list(range(1, STEPS + 1))
    assert losses(run.out) == losses(run.whole)


def test_so_are_the_online_probe_the_validations_and_the_last_checkpoint(run: Killed) -> None:
    assert "probe starts anew" not in run.second.stdout
    for names in (("probe/loss", "probe/top1"), ("val/probe_top1", "val/probe_loss", "val/loss")):
        assert logged(run.out, *names) == logged(run.whole, *names)
        assert logged(run.whole, *names)
    ours, theirs = (digests(complete_checkpoints(of / "checkpoints")[-1]) for of in (run.out, run.whole))
    assert ours == theirs
    assert "probe/weight" in ours


def test_all_of_its_time_is_booked(run: Killed) -> None:
    lines = read_lines(run.out / FILE_NAME)
    first, second = (line for line in lines if line["event"] == "start")
    found = read_goodput(run.out)
    assert found is not None
    assert found.total == pytest.approx(lines[-1]["at"] - run.submitted, abs=0.01)
    assert 0 <= run.ended - lines[-1]["at"] < 20, "tearing down and being joined"
    assert min(astuple(found)) > 0
    before = max(
        (line for line in lines[: lines.index(second)] if line["step"] <= second["step"]), key=lambda x: x["at"]
    )
    assert found.lost == pytest.approx(run.killed - before["at"], abs=0.01)
    assert second["step"] == SAVED
    queued = first["started"] - run.submitted + second["started"] - run.killed
    assert queued > 0
    assert queued <= found.waiting < queued + 5
    assert f"{found}" in run.second.stdout
    assert run.second.stdout.splitlines()[-1].startswith(f"finished at step {STEPS} of {STEPS}")
    assert len(lines) < STEPS, "few lines"


def test_a_run_that_is_finished_takes_no_step_more(run: Killed) -> None:
    expected = losses(run.out)
    assert f"finished at step {STEPS} of {STEPS}" in train(run.recipe, run.out, 2).splitlines()[-1]
    assert losses(run.out) == expected
