"""`pretrain cancel`: a run that was submitted saves and stops, and is not queued again."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from data_pipeline.errors import InputError
from launch.job_folder import JobFolder
from launch.slurm import job_fields, slurm


def cancel(run: Path, now: bool) -> None:
    """Asks a running job to save and stop; one that waits is taken out of the queue.

    Args:
        run: its folder.
        now: do not save first.

    Raises:
        InputError: nothing was submitted from there, or nothing is left of it.
    """
    folder = JobFolder(run)
    job_id, executor = folder.submitted()["job_id"], folder.submitted()["executor"]
    fields = job_fields(job_id) if executor == "slurm" and job_id is not None else None
    state = fields.get("JobState") if fields is not None else None
    if executor == "slurm" and state not in ("RUNNING", "PENDING", "CONFIGURING", "SUSPENDED"):
        raise InputError(
            where=str(run), expected="a job that runs or waits", found=f"job {job_id}, {(state or 'unknown').lower()}"
        )
    folder.cancelled.touch()
    if executor == "local":
        print(f"process {job_id} is ended" if now else f"process {job_id} is asked to save and stop")
        _signal_local(int(job_id), now)
    elif state == "RUNNING" and not now:
        slurm("scancel", "--signal=TERM", job_id)
        print(f"job {job_id} saves and stops; see `pretrain status {run}`")
    else:
        slurm("scancel", job_id)
        folder.note("cancel", why="before it ran" if state == "PENDING" else "at once")
        print(f"job {job_id} is cancelled")


def _signal_local(pid: int, now: bool) -> None:
    try:
        os.kill(pid, signal.SIGINT if now else signal.SIGTERM)  # at SIGINT submitit's controller ends what it started
    except ProcessLookupError:
        raise InputError(where=f"process {pid}", expected="a job that runs", found="no such process") from None
