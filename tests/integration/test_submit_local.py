"""`pretrain submit --local`: the job that SLURM would run, by submitit's local executor, and its cancellation."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from launch.jobs.folder import JobFolder
from tests.runs import losses, train, write_recipe
from tests.shards import write_shards

CHECKOUT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.slow


def pretrain(folder: Path, *words: str) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")} | {"PYTHONPATH": str(CHECKOUT)}
    command = [sys.executable, "-m", "launch.cli", *words]
    # The controller that is left behind holds no pipe of ours.
    with (folder / "said.txt").open("w+") as said:
        done = subprocess.run(command, cwd=folder, env=environment, stdout=said, stderr=said, timeout=120)
        said.seek(0)
        assert done.returncode == 0, said.read()
    return (folder / "said.txt").read_text()


def wait(condition: Callable[[], bool], job: JobFolder, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, [path.read_text()[-3000:] for path in job.logs.glob("*.out")]
        time.sleep(0.05)


def test_it_is_cancelled_with_its_state_saved_and_goes_on_to_the_bit(tmp_path: Path) -> None:
    recipe = write_recipe(
        tmp_path / "recipe.yaml",
        write_shards(tmp_path / "train", 96),
        schedule={"steps": 400, "warmup": 0.1},
        checkpoint={"every_steps": 1000, "every_minutes": None},
    )
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump({"ranks_per_node": 2, "time_minutes": 10}))
    words = ("submit", "recipe.yaml", "--cluster", "cluster.yaml", "--out", "run", "--local")
    job, run = JobFolder(tmp_path / "run"), tmp_path / "run"
    assert "2 ranks" in pretrain(tmp_path, *words)
    wait(lambda: len(losses(run)) >= 5, job)
    pretrain(tmp_path, "cancel", "run")
    wait(lambda: job.events()[-1]["event"] == "cancel", job)
    saved = job.newest_step()
    assert 5 <= saved < 400
    assert str(next((run / "code").iterdir())) in (run / "job" / "submitted.json").read_text()
    pretrain(tmp_path, *words)
    wait(lambda: job.events()[-1]["event"] == "done", job)
    assert [event["event"] for event in job.events()] == ["start", "end", "cancel", "start", "end", "done"]
    train(recipe, tmp_path / "whole", 2)
    assert losses(run) == losses(tmp_path / "whole")
