"""The state of a run: from its folder's record, its lock, and what SLURM says about its job."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from launch.jobs.record import ENDINGS, JobRecord
from launch.slurm.commands import AT_WORK, WAITING
from pretrain.runtime.failure import read_failure
from pretrain.runtime.run_folder import is_claimed, newest_checkpoint, step_of

State = Literal["pending", "running", "requeued", "done", "stopped", "cancelled", "failed", "unknown"]
OVER: frozenset[State] = frozenset({"done", "stopped", "cancelled", "failed"})  # nothing more comes by itself

_QUEUEING_SECONDS = 60  # that sbatch may take


class Planned(NamedTuple):
    total_steps: int | None
    global_size: int | None


def planned(run: Path) -> Planned:
    """Reads what resolved.yaml says; None: the run has not written it yet. Parsing the YAML would take longer than
    everything else that is looked up about a run.
    """
    try:
        resolved = (run / "resolved.yaml").read_text().partition("\nresolved:\n")[2]
    except OSError:
        return Planned(None, None)
    found = {key: re.search(rf"^  {key}: (\d+)$", resolved, re.MULTILINE) for key in Planned._fields}
    return Planned(**{key: int(match[1]) if match else None for key, match in found.items()})


def find_state(run: Path, job: JobRecord | None, queue: Mapping[str, str] | None) -> State:
    """Returns the state of a run.

    Args:
        job: None: it was never submitted; then whoever trains has the folder locked.
        queue: SLURM's states by job id; None: it does not answer, and "unknown" may be all that is left to say.
    """
    if job is None:
        return "running" if is_claimed(run) else "failed" if read_failure(run) is not None else _idle_state(run)
    if job.ending is not None:
        return ENDINGS[job.ending["event"]]
    if is_claimed(run):
        return "running"
    if job.job_id is None:
        return "pending" if time.time() - job.submitted["submitted_at"] < _QUEUEING_SECONDS else "failed"
    if job.is_local:
        return _process_state(run, job, job.job_id)
    if queue is None:
        return "unknown"
    state = queue.get(job.job_id, "")
    if state == "COMPLETING" and job.current and job.current[-1]["event"] == "requeue":
        return "requeued"
    if state in WAITING:
        return "requeued" if job.started else "pending"
    if state in AT_WORK:
        return "running"
    return "cancelled" if state == "CANCELLED" else _vanished_state(run, job)


def _process_state(run: Path, job: JobRecord, job_id: str) -> State:
    """Returns the state of a run whose job is a process here, with the job's number."""
    try:
        os.kill(int(job_id), 0)
    except PermissionError:
        pass
    except (OSError, ValueError):
        return _vanished_state(run, job)
    last = job.current[-1]["event"] if job.current else ""
    return "requeued" if last == "requeue" else "running" if job.started else "pending"


def _vanished_state(run: Path, job: JobRecord) -> State:
    """Returns the state of a run whose job ended, or is not known any more, and left no event of that."""
    return "cancelled" if job.unwanted else "done" if _idle_state(run) == "done" else "failed"


def _idle_state(run: Path) -> State:
    """Returns the state of a run that no process is at work in."""
    newest, total_steps = newest_checkpoint(run), planned(run).total_steps
    reached = step_of(newest) if newest is not None else 0
    return "done" if total_steps is not None and reached >= total_steps else "stopped"
