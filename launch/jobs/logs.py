"""`pretrain logs RUN` prints what the run's newest job wrote, also while it writes and after it was requeued.

A job has a pair of files for each node, `job/slurm/ID_NODE_log.out` and `.err`: rank 0's lines are plain, those of
the others begin with `[rank N] `. A run that was never submitted has `log-rank0.txt`.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from data_pipeline.errors import InputError
from launch.jobs.record import load_job
from launch.jobs.run_state import OVER, find_state
from launch.slurm.commands import job_states
from pretrain.runtime.run_folder import is_run

_LONGEST_TAIL = 1 << 20  # bytes that are looked at for the last lines of a file
_POLL_SECONDS, _ASK_SECONDS = 0.5, 15.0  # between looks at the files, and at SLURM
_RANK_PREFIX = re.compile(r"\[rank (\d+)\] ")


def show_logs(
    run: Path, *, follow: bool = False, rank: int | None = None, lines: int = 50, out: TextIO | None = None
) -> None:
    """Prints the last lines of a run's log, and with `follow` what comes, until the run is over.

    Args:
        run: its folder.
        follow: goes on into the files of later attempts and submissions.
        rank: this rank's lines alone; None: all that is written on the node of rank 0.
        lines: of each file, from its end.
        out: None: stdout.

    Raises:
        InputError: no run; no log, or none of this rank, and nothing to wait for.
    """
    refuse_no_run(run)
    printer = _Printer(out or sys.stdout, rank, lines)
    over = _Over(run)
    while follow and not over():
        for path in shown_files(run, rank):
            printer.show(path)
        printer.first_look = False
        time.sleep(_POLL_SECONDS)
    for path in shown_files(run, rank):
        printer.show(path, whole_lines=False)
    if not printer.shown:
        raise _no_log(run, rank)


def refuse_no_run(folder: Path) -> None:
    if not is_run(folder):
        raise InputError(
            where=str(folder), expected="the folder of a run, with recipe.yaml or job/submitted.json in it",
            found="none in it" if folder.is_dir() else "no such folder",
            fix="Give the folder that --out named, such as runs/NAME; `pretrain status` lists those under runs/.",
        )  # fmt: skip


def log_files(run: Path) -> list[Path]:
    """Returns the files that the newest submission's job wrote, by node; rank 0's, where nothing was submitted."""
    job = load_job(run)
    if job is None:
        return [path for path in [run / "log-rank0.txt"] if path.is_file()]
    found = [path for path in (run / "job" / "slurm").glob(f"{job.job_id}_*_log.*") if path.suffix in (".out", ".err")]
    return sorted(found, key=lambda path: (_node(path), path.suffix != ".out"))


def shown_files(run: Path, rank: int | None) -> list[Path]:
    """Returns the files that hold the lines of `rank`; for ranks other than 0 those of every node may."""
    files = log_files(run)
    if rank:
        return [path for path in files if path.name != "log-rank0.txt"]
    return [path for path in files if path.name == "log-rank0.txt" or _node(path) == 0]


def last_lines(path: Path, max_bytes: int) -> list[str]:
    """Returns the whole lines among a file's last bytes; none where there is no such file."""
    try:
        at, data = _read(path, None, max_bytes)
    except OSError:
        return []
    return data.decode(errors="replace").splitlines()[at > 0 :]


def _read(path: Path, at: int | None, limit: int | None) -> tuple[int, bytes]:
    """Reads a file from position `at`, or from 0 where it was written anew since; None: its last `limit` bytes. Returns
    where the bytes begin, and the bytes.
    """
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        if at is None:
            at = max(0, size - limit) if limit is not None else 0
        at = at if at <= size else 0
        file.seek(at)
        return at, file.read()


@dataclass
class _Printer:
    """Prints files in turn, each from where it was left, under its name where there are several."""

    out: TextIO
    rank: int | None
    num_lines: int
    first_look: bool = True
    shown: bool = False
    _at: dict[Path, int] = field(default_factory=dict)
    _last: Path | None = None

    def show(self, path: Path, *, whole_lines: bool = True) -> None:
        new, limit = path not in self._at, _LONGEST_TAIL if self.first_look else None
        at, data = _read(path, self._at.get(path), limit)
        if whole_lines:
            data = data[: data.rfind(b"\n") + 1]
        self._at[path] = at + len(data)
        lines = data.decode(errors="replace").splitlines()
        lines = [line for line in lines[new and at > 0 :] if self._wanted(line)]
        self._print(path, lines[-self.num_lines :] if new and self.first_look else lines)

    def _print(self, path: Path, lines: list[str]) -> None:
        if not lines:
            return
        if path != self._last and (self._last is not None or path.name != "log-rank0.txt"):
            self.out.write(f"==> {path} <==\n")
        self._last, self.shown = path, True
        self.out.writelines(f"{line}\n" for line in lines)
        self.out.flush()

    def _wanted(self, line: str) -> bool:
        if self.rank is None:
            return True
        match = _RANK_PREFIX.match(line)
        return (int(match[1]) if match else 0) == self.rank


class _Over:
    """Knows whether nothing more will come; it looks at the folder each time, and asks SLURM now and then."""

    def __init__(self, run: Path, now: Callable[[], float] = time.monotonic) -> None:
        self._run, self._now = run, now
        self._asked_at = -_ASK_SECONDS
        self._queue: dict[str, str] | None = None

    def __call__(self) -> bool:
        job = load_job(self._run)
        if job is not None and job.job_id is not None and self._now() - self._asked_at >= _ASK_SECONDS:
            self._queue, self._asked_at = None if job.is_local else job_states([job.job_id]), self._now()
        return find_state(self._run, job, self._queue) in OVER


def _node(path: Path) -> int:
    """Returns the node's number from `ID_NODE_log.out`; a job's own script writes to that of node 0."""
    parts = path.name.split("_")
    return int(parts[-2]) if len(parts) > 2 and parts[-2].isdecimal() else 0


def _no_log(run: Path, rank: int | None) -> InputError:
    job = load_job(run)
    what = "a log" if rank is None else f"a log of rank {rank}"
    if job is None and rank:
        found, fix = "only what rank 0 said: the others wrote where it was started", "Leave --rank out."
    elif job is None:
        found, fix = "none, and no job that would write one", f"Start it: pretrain train RECIPE --out {run}"
    elif log_files(run):
        found, fix = "none of its lines", "Leave --rank out to see all that the first node wrote."
    else:
        state = find_state(run, job, job_states([job.job_id]) if job.job_id is not None and not job.is_local else None)
        found, fix = f"none yet; job {job.job_id} is {state}", "Wait for it with --follow."
    return InputError(where=str(run), expected=what, found=found, fix=fix)
