"""A chain by jobs of a cluster: what each is and waits for, and how a stage becomes done."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import InputError, RunError
from launch.chains.stage_job import StageJob, keep_stage
from launch.chains.submit import submit_chain
from launch.commands.chain import evaluation_commands
from launch.commands.label import select
from launch.jobs import after_job
from launch.jobs.folder import JobFolder
from launch.jobs.node import attempt_folder
from launch.jobs.queue import PlannedJob
from tests.launch.run_folders import Commands
from tests.launch.run_folders import submit as submit_run
from tests.runs import write_recipe
from tests.shards import write_shards


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    """A selection, and a training on it."""
    shards = write_shards(tmp_path / "shards", 60)
    objective = {"kind": "supervised", "num_classes": 3}
    write_recipe(tmp_path / "r.yaml", shards, objective=objective, schedule={"steps": 4})
    train = [{"path": str(shards), "select": "${few}"}]
    stages = [
        {"name": "few", "select": {"source": str(shards), "per_class": 5}},
        {"name": "teacher", "train": "r.yaml", "set": {"data.train": train}},
    ]
    path = tmp_path / "chain.yaml"
    path.write_text(json.dumps({"name": "tiny", "stages": stages}))
    (tmp_path / "cluster.yaml").write_text("partition: long\naccount: vision\nnodes: 2\ntime_minutes: 20\n")
    return path


def submit(chain: Path, **given: Any) -> Path:
    """Returns the chain's folder."""
    submit_chain(chain, chain.parent / "cluster.yaml", chain.parent / "out", evaluation_commands, **given)
    return chain.parent / "out"


def test_each_stage_is_a_job_that_writes_down_when_it_is_done(
    chain: Path, cluster: Commands, capsys: pytest.CaptureFixture[str]
) -> None:
    out = submit(chain, dry_run=True)
    few, teacher = capsys.readouterr().out.split("#!/bin/bash")[1:]
    assert f"-m launch.chains.stage_job {out / 'few.job'} $?" in few
    assert f"-m launch.chains.stage_job {out / 'teacher'} $?" in teacher
    assert "--nodes=1" in few, "one rank's share"
    assert "--nodes=2" in teacher
    assert "afterok:<job of few>" in teacher
    assert not out.exists()


def test_all_of_a_chain_is_queued_or_nothing(chain: Path, cluster: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[tuple[str, ...]] = []
    queued: list[tuple[str, list[str]]] = []

    def queue(job: PlannedJob, code: Path, record: dict[str, Any]) -> str:
        if queued:
            raise KeyboardInterrupt
        queued.append((job.name, record["after"]))
        return "11"

    monkeypatch.setattr("launch.jobs.queue._queue", queue)
    monkeypatch.setattr("launch.jobs.submission.check_cluster", lambda *_: None)
    monkeypatch.setattr("launch.jobs.queue.slurm", lambda *words, **_: said.append(words))
    with pytest.raises(KeyboardInterrupt):
        submit(chain)
    assert queued == [("tiny-few", [])]
    assert said == [("scancel", "11")]


class Executor:
    """In place of submitit's: takes jobs, up to a number, as it would for SLURM."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.taken: list[bytes] = []
        self.after: list[list[str]] = []

    def __call__(self, folder: Path, name: str, cluster: Any, code: Path, after: list[str], module: str) -> Executor:
        self.after.append(after)
        return self

    def submit(self, job: StageJob) -> Any:
        if len(self.taken) == self.most:
            raise RuntimeError("QOSMaxSubmitJobPerUserLimit")
        self.taken.append(pickle.dumps(job))
        return type("Queued", (), {"job_id": str(10 + len(self.taken))})


@pytest.fixture
def executor(cluster: Commands, monkeypatch: pytest.MonkeyPatch) -> Executor:
    found = Executor(most=2)
    monkeypatch.setattr("launch.jobs.queue.slurm_executor", found)
    return found


def test_a_stage_that_slurm_refuses_takes_back_those_before(
    chain: Path, executor: Executor, cluster: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor.most = 1
    said: list[tuple[str, ...]] = []
    monkeypatch.setattr("launch.jobs.queue.slurm", lambda *words, **_: said.append(words))
    with pytest.raises(RunError, match="QOSMax"):
        submit(chain)
    assert said == [("scancel", "11")]


def test_a_job_of_a_stage_that_the_file_no_longer_has_is_still_the_chains(
    chain: Path, executor: Executor, cluster: Commands
) -> None:
    submit_run(chain.parent / "out" / "taken-out", "99")
    cluster.says("scontrol", "JobId=99 JobState=RUNNING", when="show*99")
    with pytest.raises(InputError, match="job 99, running"):
        submit(chain)
    assert not executor.taken


def test_a_stage_is_done_when_its_job_has_written_that_down(
    chain: Path, executor: Executor, cluster: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = submit(chain)
    assert executor.after == [[], ["11"]]
    assert JobFolder(out / "teacher").recipe.is_file()
    folder, job = JobFolder(out / "few.job"), pickle.loads(executor.taken[0])
    assert type(job) is StageJob
    assert job.token == folder.submitted()["token"]
    assert not job.was_done(folder)
    for name, value in (("SLURM_JOB_ID", "11"), ("SLURMD_NODENAME", "n0"), ("SLURM_RESTART_COUNT", "0")):
        monkeypatch.setenv(name, value)
    cluster.says("scontrol", "JobId=11 JobState=RUNNING Restarts=0", when="show*11")

    def ends_well() -> tuple[str, str]:
        """An attempt of which the one node reports success."""
        folder.note("start", attempt=folder.num_attempts(), job_id="11", nodes=["n0"], restart=0, step=0)
        left = attempt_folder(folder.run, "11", 0)
        left.mkdir(parents=True, exist_ok=True)
        (left / "n0.joined").touch()
        (left / "n0.json").write_text(json.dumps({"status": 0, "why": "", "at": 0.0}))
        status = after_job.main(folder.run, 0, keep_stage)
        last = folder.events()[-1]
        assert (status == 0) == (last["event"] == "done")
        return last["event"], last["why"]

    (out / "chain" / "chain.yaml").rename(out / "chain" / "gone")
    event, why = ends_well()
    assert event == "stop"
    assert "it ended well, which could not be written down" in why
    (out / "chain" / "gone").rename(out / "chain" / "chain.yaml")
    assert not job.was_done(folder)

    words = folder.submitted()["words"]
    assert words[:2] == ["data", "select"]
    select(words[2], Path(words[3]), per_class=5)
    assert ends_well() == ("done", "")
    assert job.was_done(folder)
