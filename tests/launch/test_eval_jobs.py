"""Which checkpoints are judged by jobs of their own, and how long what they judge is held."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from data_pipeline.errors import RunError
from launch.jobs.eval_jobs import EvalJobs, are_separate, hold, release
from launch.jobs.eval_submit import queue_evaluation
from launch.jobs.folder import JobFolder
from launch.slurm.cluster import Cluster
from pretrain.recipe.files import load_recipe
from pretrain.recipe.resolve import resolve
from pretrain.runtime.run_folder import COMPLETE, eval_name, folder_name
from tests.launch.run_folders import Commands
from tests.runs import write_recipe
from tests.shards import write_shards

EVALS = [
    {"kind": "knn", "train": "a", "test": "b", "every_epochs": 2},  # 80 samples by 8: 20 steps
    {"kind": "knn", "train": "a", "test": "c", "every_epochs": 3},
]


@pytest.fixture
def jobs(tmp_path: Path) -> EvalJobs:
    shards = write_shards(tmp_path / "shards", 80)
    recipe = write_recipe(tmp_path / "r.yaml", shards, batch={"global_size": 8}, schedule={"steps": 65}, evals=EVALS)
    loaded = load_recipe(recipe)
    return EvalJobs(tmp_path / "run", loaded.evals, resolve(loaded, 2, 80))


def save(run: Path, *steps: int) -> None:
    for step in steps:
        folder = run / "checkpoints" / folder_name(step)
        folder.mkdir(parents=True)
        (folder / COMPLETE).write_text(str(step))


def queue(run: Path, entries: list[tuple[int, int]], *, started: bool = True) -> None:
    for index, step in entries:
        job = JobFolder(run / "evals" / f"{eval_name(index, 'knn')}_{folder_name(step)}.job")
        job.write("submitted.json", json.dumps({"job_id": "1", "submitted_at": 0.0}))
        if started:
            job.note("start", job_id="1")


def test_each_entry_judges_a_checkpoint_of_each_of_its_periods_and_the_last(jobs: EvalJobs, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert jobs.due() == []
    save(run, 8, 16)
    assert jobs.due() == []
    save(run, 24)
    assert jobs.due() == [(0, 24)]
    queue(run, jobs.due())
    save(run, 32)
    assert jobs.due() == [(1, 32)]
    queue(run, jobs.due())
    assert jobs.due() == []
    save(run, 40, 48)
    assert jobs.due() == [(0, 48)], "the newest, as older ones are removed"
    queue(run, jobs.due(), started=False)
    save(run, 64)
    assert jobs.due() == [(1, 64)], "the other entry's last job still waits"
    save(run, 65)
    assert jobs.due() == [(0, 65), (1, 65)], "the last is judged in any case"
    queue(run, jobs.due())
    assert jobs.due() == []


def test_what_goes_wrong_is_told_and_training_goes_on(
    jobs: EvalJobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise BlockingIOError(11, "no more processes")

    monkeypatch.setattr("subprocess.run", refuse)
    save(tmp_path / "run", 24)
    jobs.look()
    assert "no more processes" in capsys.readouterr().err
    jobs.look()
    assert capsys.readouterr().err == "", "not before a while"


@pytest.mark.parametrize(("fails", "tries"), [(1, 2), (2, 3), (9, 3)])
def test_where_slurm_does_not_take_a_job_it_is_asked_again(
    jobs: EvalJobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: int, tries: int
) -> None:
    """At the end of a run nobody looks later."""
    asked: list[list[str]] = []

    def submit(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        if "launch.jobs.eval_submit" not in command:  # what SLURM knows of earlier ones
            return subprocess.CompletedProcess(command, 1, "", "")
        asked.append(command)
        if len(asked) > fails:
            queue(tmp_path / "run", [(0, 24)])
        return subprocess.CompletedProcess(command, len(asked) <= fails, "", "Socket timed out")

    monkeypatch.setattr("subprocess.run", submit)
    monkeypatch.setattr("launch.jobs.eval_jobs._PAUSE_SECONDS", 0.01)
    save(tmp_path / "run", 24)
    jobs.finish()
    assert len(asked) == tries
    jobs.finish()
    assert len(asked) == tries


def test_one_entry_that_slurm_does_not_take_leaves_the_others_their_turn(
    jobs: EvalJobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def submit(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        if "launch.jobs.eval_submit" in command:
            asked.append(command[-2])
            if command[-2] == "1":
                queue(tmp_path / "run", [(1, 32)])
        return subprocess.CompletedProcess(command, command[-2] != "1", "", "")

    monkeypatch.setattr("subprocess.run", submit)
    monkeypatch.setattr("launch.jobs.eval_jobs._PAUSE_SECONDS", 0.01)
    save(tmp_path / "run", 32)
    jobs.finish()
    assert asked == ["0", "1", "0", "0"]


def test_a_submission_that_fails_holds_nothing(
    tmp_path: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands.says("scontrol", when="show*job*-o")  # no job of an earlier one is held

    def refuse(*_: object, **__: object) -> str:
        raise RunError("sbatch", "SLURM to take the job", "QOSMaxSubmitJobPerUserLimit")

    monkeypatch.setattr("launch.jobs.queue._queue", refuse)
    recipe = write_recipe(tmp_path / "r.yaml", write_shards(tmp_path / "shards", 80), evals=EVALS)
    run = tmp_path / "run"
    JobFolder(run).write("recipe.yaml", recipe.read_text())
    JobFolder(run).write("cluster.yaml", "{}")
    JobFolder(run).write("submitted.json", json.dumps({"code": "code"}))
    save(run, 24)
    with pytest.raises(RunError, match="QOSMax"):
        queue_evaluation(run, 0, 24)
    assert not list((run / "held_knn").iterdir())
    with pytest.raises(RunError, match=r"hold by hard links.*keep_last"):
        queue_evaluation(run, 0, 32)
    assert not list((run / "held_knn").iterdir())


def test_only_a_job_of_slurm_has_its_evaluations_apart(
    jobs: EvalJobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(tmp_path / "r.yaml")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert not are_separate(recipe.evals, Cluster(evals_apart=True))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert are_separate(recipe.evals, Cluster(evals_apart=True))
    assert not are_separate(recipe.evals, Cluster())
    assert not are_separate((), Cluster(evals_apart=True))


def test_what_is_judged_is_held_for_each_of_its_jobs(tmp_path: Path) -> None:
    save(tmp_path, 8)
    checkpoint = tmp_path / "checkpoints" / folder_name(8)
    first, second = (hold(tmp_path, entry, 8) for entry in ("knn", "knn2"))
    assert hold(tmp_path, "knn", 8) == first, "held already"
    assert os.path.samefile(checkpoint / COMPLETE, first / COMPLETE), "no bytes are copied"
    shutil.rmtree(checkpoint)
    release(first)
    assert not first.exists()
    assert (second / COMPLETE).read_text() == "8"


def test_what_is_due_is_held_before_its_jobs_are_queued(
    jobs: EvalJobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As training goes on meanwhile, and removes the checkpoint."""
    run, asked = tmp_path / "run", []

    def submit(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        shutil.rmtree(run / "checkpoints" / folder_name(32), ignore_errors=True)
        *_, folder, index, step = command
        asked.append((int(index), (hold(Path(folder), eval_name(int(index), "knn"), int(step)) / COMPLETE).read_text()))
        return subprocess.CompletedProcess(command, 0, "queued", "")

    monkeypatch.setattr("subprocess.run", submit)
    save(run, 32)
    jobs.look()
    assert asked == [(0, "32"), (1, "32")]
