"""`pretrain submit --local`: the job that SLURM would run, by submitit's local executor, and its cancellation."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import yaml

from launch.jobs.folder import JobFolder
from tests.commands import pretrain
from tests.gate import Gate, until
from tests.runs import losses, train, write_recipe
from tests.shards import write_shards

pytestmark = pytest.mark.slow
STEPS = 60


def test_it_is_canceled_with_its_state_saved_and_goes_on_to_the_bit(tmp_path: Path) -> None:
    """The job's processes are its own, from its copy of the code."""
    gate = Gate(tmp_path / "gate")
    recipe = write_recipe(
        tmp_path / "recipe.yaml",
        write_shards(tmp_path / "train", 96),
        schedule={"steps": STEPS, "warmup": 0.1},
        checkpoint={"every_steps": 1000, "every_minutes": None},
    )
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump({"ranks_per_node": 2, "time_minutes": 10}))
    words = ("submit", "recipe.yaml", "--cluster", "cluster.yaml", "--out", "run", "--local")
    job, run = JobFolder(tmp_path / "run"), tmp_path / "run"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")} | gate.in_front_of(tmp_path)

    def said() -> list[str]:
        return [path.read_text()[-3000:] for path in job.logs.glob("*.out")]

    def last_event() -> object:
        return job.events()[-1]["event"]

    gate.open(5)
    assert "2 ranks" in pretrain(*words, folder=tmp_path, environment=environment).stdout
    until(lambda: len(losses(run)) == 5, said=said)
    pretrain("cancel", "run", folder=tmp_path, environment=environment)
    began = time.monotonic()

    def canceled() -> bool:
        """The word is on its way to the ranks, which take a step in a quarter of a second meanwhile."""
        gate.open(min(STEPS - 1, 6 + int(4 * (time.monotonic() - began))))
        return last_event() == "cancel"

    until(canceled, said=said)
    saved = job.newest_step()
    assert 5 < saved < STEPS
    assert saved == max(losses(run))
    assert str(next((run / "code").iterdir())) in (run / "job" / "submitted.json").read_text()
    gate.open(STEPS)
    pretrain(*words, folder=tmp_path, environment=environment)
    until(lambda: last_event() == "done", said=said)
    assert [event["event"] for event in job.events()] == ["start", "end", "cancel", "start", "end", "done"]
    train(recipe, tmp_path / "whole", 2)
    assert losses(run) == losses(tmp_path / "whole")
