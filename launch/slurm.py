"""What SLURM's commands answer, within seconds; where they do not answer, that is an answer too."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass

WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD")
AT_WORK = ("RUNNING", "COMPLETING", "RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED", "SUSPENDED")


@dataclass(frozen=True)
class Answer:
    """Of one command; `problem` is empty where it succeeded."""

    text: str
    problem: str

    @property
    def lines(self) -> list[str]:
        return [line.strip() for line in self.text.splitlines() if line.strip()]


def ask(command: str, *arguments: str, seconds: float = 10) -> Answer:
    """Runs a command of SLURM's."""
    if shutil.which(command) is None:
        return Answer("", "not installed here")
    try:
        done = subprocess.run([command, *arguments], capture_output=True, text=True, errors="replace", timeout=seconds)
    except subprocess.TimeoutExpired:
        return Answer("", f"no answer in {seconds:g} seconds")
    except OSError as error:
        return Answer("", error.strerror or str(error))
    if done.returncode:
        said = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        return Answer(done.stdout, said[-1] if said else f"exit status {done.returncode}")
    return Answer(done.stdout, "")


def job_states(job_ids: Iterable[str]) -> dict[str, str] | None:
    """SLURM's word for the state of each job, as far as it still knows it; None where it does not answer."""
    ids = sorted(set(job_ids))
    if not ids:
        return {}
    queue = ask("squeue", "--noheader", "--states=all", f"--jobs={','.join(ids)}", "--format=%i %T")
    if queue.problem and "Invalid job id" not in queue.problem:  # what it says of a single one that is long over
        return None
    states = _by_id(queue.lines, " ")
    if unknown := [job_id for job_id in ids if job_id not in states]:
        columns = ("--noheader", "--parsable2", "--allocations", "--format=JobIDRaw,State")
        states |= _by_id(ask("sacct", *columns, f"--jobs={','.join(unknown)}").lines, "|")
    return states


def _by_id(lines: Iterable[str], separator: str) -> dict[str, str]:
    """The first word of the state: sacct says `CANCELLED by 1000`."""
    pairs = (line.partition(separator) for line in lines)
    return {job_id: state.split()[0] for job_id, _, state in pairs if state.split()}
