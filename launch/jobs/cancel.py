"""`pretrain cancel` has jobs save and stop, so that they are not queued again."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from data_pipeline.errors import InputError, PretrainError, RunError
from launch.jobs.folder import JobFolder
from launch.slurm.commands import AT_WORK, WAITING, job_fields, slurm

_ALIVE = (*WAITING, *AT_WORK)


def cancel(folder: Path, now: bool) -> None:
    """Asks running jobs to save and stop; those that wait are taken out of the queue.

    Args:
        folder: that of a run, or of a chain: all of its jobs, those that wait for others first.
        now: do not save first.

    Raises:
        InputError: nothing was submitted from there, or nothing is left of it.
    """
    if not (folder / "chain" / "chain.yaml").is_file():
        job = JobFolder(folder)
        with _remembered([job]):
            state = _state(job)
        _cancel(job, now, state)
        return
    jobs = [JobFolder(path.parent.parent) for path in folder.glob("*/job/submitted.json")]
    with _remembered(jobs):
        alive = [(job, state) for job in jobs if (state := _state(job)) in _ALIVE]
    if not alive:
        raise InputError(
            where=str(folder), expected="jobs that run or wait", found="none", fix=f"See `pretrain status {folder}`."
        )
    for job, state in sorted(alive, key=lambda one: one[1] in AT_WORK):
        try:
            _cancel(job, now, state)
        except PretrainError as error:  # it has ended meanwhile
            print(f"{job.run}: {error}")


@contextmanager
def _remembered(jobs: Sequence[JobFolder]) -> Iterator[None]:
    """Leaves the wish in the jobs' folders where SLURM does not answer: they are then not queued again."""
    try:
        yield
    except RunError as error:
        for job in jobs:
            job.canceled.touch()
        fix = "What waits ends as it starts, what runs is not queued again. To end it now, give the command once more."
        raise RunError(error.where, error.expected, error.found, fix) from None


def _state(job: JobFolder) -> str | None:
    """Returns SLURM's word for the state of a job, "RUNNING" for a local one; None: SLURM does not know it."""
    submitted = job.submitted()
    if submitted["executor"] == "local":
        return "RUNNING"
    fields = job_fields(submitted["job_id"]) if submitted["job_id"] is not None else None
    return fields.get("JobState") if fields is not None else None


def _cancel(job: JobFolder, now: bool, state: str | None) -> None:
    job_id, executor = job.submitted()["job_id"], job.submitted()["executor"]
    if state not in _ALIVE:
        raise InputError(
            where=str(job.run),
            expected="a job that runs or waits",
            found=f"job {job_id}, {(state or 'unknown').lower()}" if job_id is not None else "one that was not queued",
            fix=f"See `pretrain status {job.run}`.",
        )
    job.canceled.touch()
    if executor == "local":
        print(f"process {job_id} is ended" if now else f"process {job_id} is asked to save and stop")
        _signal_local(int(job_id), now)
    elif state == "RUNNING" and not now:
        slurm("scancel", "--signal=TERM", job_id)
        print(f"job {job_id} saves and stops; see `pretrain status {job.run}`")
    else:
        slurm("scancel", job_id)
        job.note("cancel", job_id=job_id, why="before it ran" if state in WAITING else "at once")
        print(f"job {job_id} is canceled")


def _signal_local(pid: int, now: bool) -> None:
    try:
        os.kill(pid, signal.SIGINT if now else signal.SIGTERM)  # at SIGINT submitit's controller ends what it started
    except ProcessLookupError:
        raise InputError(where=f"process {pid}", expected="a job that runs", found="no such process") from None
