"""`pretrain status [RUN...]` prints a table of runs. Loads no torch, and reads only the end of big files."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_pipeline.errors import PretrainError
from data_pipeline.messages import visible
from launch.jobs.logs import last_lines, log_files, refuse_no_run
from launch.jobs.record import JobRecord, load_job
from launch.jobs.run_state import OVER, State, find_state, planned
from launch.jobs.telling import COMMENT
from launch.slurm.commands import HELD, job_comment, job_fields, job_states
from pretrain.runtime.failure import read_failure
from pretrain.runtime.run_folder import COMPLETE, is_run, newest_checkpoint, step_of

_TAIL = 1 << 16  # bytes
_LEFT_TO_DO: frozenset[State] = frozenset({"pending", "running", "requeued"})
_ERROR = re.compile(r"\b(?:error:|\w*Error\b|\w*Exception\b|killed by|Killed\b|out of memory|CANCELLED)", re.IGNORECASE)


@dataclass(frozen=True)
class Status:
    """The status of a run; None: a value is not known.

    Attributes:
        step: the latest logged, which may be ahead of the checkpoint.
        goodput: share of the wall time that trained, in [0, 1].
        eta_seconds: of training that is left, at the latest rate; None of a run that is over.
        requeues: starts that no submission asked for; None: it was never submitted.
        error: the last line of its job's logs that tells of one, or why it was stopped, failed, or does not start.
    """

    run: str
    state: State
    step: int | None
    total_steps: int | None
    samples_per_second: float | None
    goodput: float | None
    eta_seconds: float | None
    checkpoint_step: int | None
    checkpoint_age_seconds: float | None
    requeues: int | None
    error: str | None


def show_status(folders: Sequence[Path], *, as_json: bool = False) -> None:
    """Prints the table of these runs, and of the runs inside these folders; as a JSON list for machines.

    Raises:
        InputError: a folder is no run and holds none.
    """
    runs = list(dict.fromkeys(run for folder in folders for run in find_runs(folder)))
    jobs = {run: load_job(run) for run in runs}
    queue = job_states(
        job.job_id for job in jobs.values() if job is not None and job.job_id is not None and not job.is_local
    )
    found = [run_status(run, job, queue) for run, job in jobs.items()]
    print(
        json.dumps([asdict(status) for status in found], indent=1)
        if as_json
        else visible("\n".join(table(found)), lines=True)
    )


def find_runs(folder: Path) -> list[Path]:
    """Returns `folder` if it is a run, else the runs in it, and in the chains in it, by name.

    Raises:
        InputError: there are none.
    """
    runs = _runs_in(folder, depth=2)
    if not runs:
        refuse_no_run(folder)
    return runs


def _runs_in(folder: Path, depth: int) -> list[Path]:
    """Returns the runs in a folder; inside a run there are none, whatever lies there."""
    if is_run(folder):
        return [folder]
    inside = sorted(path for path in folder.glob("*/")) if depth else []
    return [run for path in inside for run in _runs_in(path, depth - 1)]


def run_status(run: Path, job: JobRecord | None, queue: dict[str, str] | None) -> Status:
    """Returns the status of one run; `queue` as `job_states` gives it."""
    state, plan, (logged, rate) = find_state(run, job, queue), planned(run), _last_logged(run)
    newest = newest_checkpoint(run)
    saved = None if newest is None else step_of(newest)
    step = max((done for done in (logged, saved) if done is not None), default=None)
    eta = None
    if state in _LEFT_TO_DO and rate and plan.total_steps and plan.global_size:
        eta = max(0, plan.total_steps - (step or 0)) * plan.global_size / rate
    return Status(
        run=str(run),
        state=state,
        step=step,
        total_steps=plan.total_steps,
        samples_per_second=rate,
        goodput=productive_share(run, state),
        eta_seconds=eta,
        checkpoint_step=saved,
        checkpoint_age_seconds=None if newest is None else _age(newest / COMPLETE),
        requeues=None if job is None else job.requeues,
        error=_interrupted(state, job) or _error(run, job) or _left_with_slurm(state, job),
    )


def productive_share(run: Path, state: State) -> float | None:
    """Returns the share of the run's wall time that trained, up to now unless it is over; None: nothing was booked."""
    from pretrain.monitoring.goodput import read_goodput

    booked = read_goodput(run, now=None if state in OVER else time.time())
    return booked.share if booked is not None and booked.total else None


def table(rows: Sequence[Status]) -> Iterator[str]:
    """Yields aligned lines under a head; the error, which is long, stands last."""
    head = ("run", "state", "step", "samples/s", "goodput", "left", "checkpoint", "requeues", "last error")
    cells = [head, *(_cells(row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        yield "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()


def _cells(row: Status) -> tuple[str, ...]:
    saved = "-" if row.checkpoint_step is None else f"{row.checkpoint_step}, {_ago(row.checkpoint_age_seconds)}"
    return (
        row.run,
        row.state,
        f"{_or_dash(row.step)}/{_or_dash(row.total_steps)}",
        _or_dash(row.samples_per_second, ".0f"),
        _or_dash(row.goodput, ".1%"),
        _ago(row.eta_seconds),
        saved,
        _or_dash(row.requeues),
        row.error or "-",
    )


def _or_dash(value: float | None, form: str = "") -> str:
    return "-" if value is None else format(value, form)


def _ago(seconds: float | None) -> str:
    """Returns a duration in its two largest units."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [(days, "d"), (hours, "h"), (minutes, "min"), (rest, "s")]
    first = next((i for i, (count, _) in enumerate(parts) if count), 3)
    return " ".join(f"{count} {unit}" for count, unit in parts[first : first + 2])


def _age(path: Path) -> float | None:
    try:
        return max(0.0, time.time() - path.stat().st_mtime)
    except OSError:  # removed just now, as a newer one is there
        return None


def _last_logged(run: Path) -> tuple[int | None, float | None]:
    """Returns the last step in metrics.jsonl, and the samples per second of the last line that has them."""
    step: int | None = None
    for line in reversed(last_lines(run / "metrics.jsonl", _TAIL)):
        try:
            values: dict[str, Any] = json.loads(line)
        except ValueError:  # half written
            continue
        step = values["step"] if step is None else step
        if (rate := values.get("images_per_second")) is not None:
            return step, rate
    return step, None


def _interrupted(state: State, job: JobRecord | None) -> str | None:
    """Returns what a submission that was killed has left; None: it was not, or its job may start all the same."""
    if job is None or job.is_local or job.released or state not in ("pending", "failed"):
        return None
    if job.job_id is None:
        return "its submission was interrupted; submit it again" if state == "failed" else None
    with suppress(PretrainError):
        if (job_fields(job.job_id) or {}).get("Reason") == HELD:
            return (
                f"job {job.job_id} is held: the submission that queued it is at work, or was interrupted; if so, "
                "submit again"
            )
    return None


def _left_with_slurm(state: State, job: JobRecord | None) -> str | None:
    """Returns what a job that failed could not write into its folder, and left as a comment."""
    if state != "failed" or job is None or job.job_id is None or job.is_local:
        return None
    said = job_comment(job.job_id)
    return said.removeprefix(COMMENT) if said.startswith(COMMENT) else None


def _error(run: Path, job: JobRecord | None) -> str | None:
    if job is None:
        return read_failure(run)
    newest = sorted((path for path in log_files(run)), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in newest:
        for line in reversed(last_lines(path, _TAIL)):
            if _ERROR.search(line):
                return line.strip()
    why = job.ending.get("why") if job.ending is not None else None
    return read_failure(run) if why is None else str(why)
