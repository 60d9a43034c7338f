"""Jobs are queued held, their numbers made durable, then released: what a failure in between leaves, and who mends it.

That real ones are, with the submission killed at each of these places, tests/slurm/test_queue.py shows.
"""

from __future__ import annotations

import fcntl
import json
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import InputError, RunError
from launch.jobs import submission
from launch.jobs.eval_jobs import EvalJobs
from launch.jobs.eval_submit import queue_evaluation
from launch.jobs.folder import JobFolder
from launch.jobs.queue import PlannedJob, mend_submission, only_submission, refuse_running
from launch.jobs.record import load_job
from launch.jobs.submission import submit_jobs
from launch.slurm.cluster import Cluster
from pretrain.runtime.run_folder import folder_name
from tests.launch.run_folders import Commands
from tests.launch.test_eval_jobs import jobs, save  # noqa: F401


@pytest.fixture
def out(tmp_path: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose jobs SLURM takes, as number 7 and further, and releases."""
    numbers = iter(range(7, 99))
    monkeypatch.setattr("launch.jobs.queue._queue", lambda *_: str(next(numbers)))
    monkeypatch.setattr(submission, "check_cluster", lambda *_: None)
    for command in ("scontrol", "scancel"):
        commands.says(command)
    commands.says("scontrol", "slurm_load_jobs error: Invalid job id specified", when="show*", status=1)
    commands.says("scontrol", when="show*job*-o")
    return tmp_path / "out"


def submit(out: Path, *names: str, **given: Any) -> None:
    planned = [PlannedJob(out / name, name, Cluster(), {"words": ["data", "label"]}) for name in names]
    submit_jobs(planned, Path("cluster.yaml"), out, **given)


def copies(out: Path) -> list[Path]:
    return list((out / "code").iterdir()) if (out / "code").is_dir() else []


def released(out: Path, *names: str) -> list[Any]:
    return [JobFolder(out / name).submitted()["released"] for name in names]


def left_held(run: Path, job_id: str | None = "7") -> Path:
    """As a submission leaves it that was killed before the release."""
    record = {"executor": "slurm", "job_id": job_id, "submitted_at": 0.0, "released": False}
    JobFolder(run).write("submitted.json", json.dumps(record))
    return run


def held_line(run: Path, job_id: str = "7", reason: str = "JobHeldUser") -> str:
    return f"JobId={job_id} JobName=a JobState=PENDING Reason={reason} Dep=x StdOut={run}/job/slurm/{job_id}_0_log.out"


def test_what_cannot_be_told_of_jobs_that_may_start_takes_nothing_from_them(out: Path) -> None:
    """Such as `pretrain chain ... | head -1`: they would find no code."""

    def tell(job: PlannedJob, job_id: str) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        submit(out, "a", "b", tell=tell)
    assert released(out, "a", "b") == [True, True]
    assert len(copies(out)) == 1


def test_a_release_that_slurm_does_not_answer_leaves_the_code(out: Path, commands: Commands) -> None:
    """It may have released them."""
    commands.says("scontrol", "Socket timed out", when="release*7,8", status=1)
    with pytest.raises(RunError, match="Socket timed out"):
        submit(out, "a", "b")
    assert released(out, "a", "b") == [False, False]
    assert len(copies(out)) == 1


def test_a_submission_that_fails_before_leaves_no_code(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> str:
        raise RunError("sbatch", "SLURM to take the job", "QOSMax")

    monkeypatch.setattr("launch.jobs.queue._queue", refuse)
    with pytest.raises(RunError, match="QOSMax"):
        submit(out, "a")
    assert not (out / "code").exists()


def test_what_a_submission_at_work_holds_is_left_to_it(out: Path, commands: Commands) -> None:
    """The jobs of a chain whose numbers are known are looked at by whoever submits it at the same time."""
    held = left_held(out / "a")
    commands.says("scontrol", held_line(held), when="show*job*-o")
    commands.says("scontrol", held_line(held), when="show*7")
    commands.says("scancel", "it took a job of another", status=1)
    with only_submission(out), pytest.raises(InputError, match="another that is at work"):
        submit(out, "b", beside=[held])
    with pytest.raises(InputError, match="job 7, pending"):
        refuse_running(held)


def test_storage_without_locks_is_told(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    out.mkdir()
    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(InputError, match=r"a file can be locked, found Function not implemented"), only_submission(out):
        pass


@pytest.mark.parametrize("job_id", [None, "7"])
def test_a_job_that_was_left_held_is_taken_out_of_the_queue(
    out: Path, commands: Commands, capsys: pytest.CaptureFixture[str], job_id: str | None
) -> None:
    """Also one whose number nobody wrote down, and that of a stage which the chain no longer has."""
    held = left_held(out / "a", job_id)
    others = (held_line(out / "b", "8"), held_line(out / "a.b", "9"), held_line(held, "10", "Priority"))
    commands.says("scontrol", "\n".join((*others, held_line(held))), when="show*job*-o")
    submit(out, "c", beside=[held])
    assert capsys.readouterr().out.count("is taken out of the queue") == 1
    assert released(out, "c") == [True]


def test_a_job_that_a_killed_submission_had_released_is_known_as_that(out: Path, commands: Commands) -> None:
    run = left_held(out / "a")
    commands.says("scontrol", held_line(run, reason="Priority"), when="show*7")
    mend_submission(run)
    assert released(out, "a") == [True]


def evaluation(run: Path, step: int) -> Path:
    return run / "evals" / f"knn_{folder_name(step)}.job"


def test_an_evaluation_whose_submission_was_killed_is_queued_again(
    out: Path,
    jobs: EvalJobs,  # noqa: F811
    tmp_path: Path,
    commands: Commands,
) -> None:
    run = tmp_path / "run"
    JobFolder(run).write("recipe.yaml", (tmp_path / "r.yaml").read_text())
    JobFolder(run).write("cluster.yaml", "{}")
    JobFolder(run).write("submitted.json", json.dumps({"code": "code"}))
    save(run, 24)
    left_held(evaluation(run, 24))
    assert jobs.due() == [(0, 24)]
    queue_evaluation(run, 0, 24)
    assert jobs.due() == []
    left_held(evaluation(run, 24))
    commands.says("scontrol", held_line(evaluation(run, 24), reason="None"), when="show*7")
    queue_evaluation(run, 0, 24)  # it was killed after the release: that job is not queued twice
    job = load_job(evaluation(run, 24))
    assert job is not None
    assert (job.job_id, job.released) == ("7", True)
