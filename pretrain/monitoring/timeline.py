"""What a run writes down about where its time goes: a line for each attempt's begin, saves, and every few seconds.

goodput.py adds it up.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

FILE_NAME = "timeline.jsonl"
_KINDS = {"data": "waiting", "step": "productive", "evaluation": "productive", "checkpoint": "saving"}
_UNIX = time.time() - time.monotonic()


def unix_time() -> float:
    """Unix seconds as the clock stood when this was imported, counted on from there: it never jumps."""
    return _UNIX + time.monotonic()


class Timeline:
    """Appends to a run's `timeline.jsonl`; on every rank but 0 it does nothing. A full disk costs lines, not the run.

    The last line is written over at every mark, in place, until it is due to stay: so the file grows slowly, and yet
    tells how far a killed process had come.

    Args:
        folder: of the run.
        step: steps applied when this attempt goes on.
        active: whether this rank writes.
        clock: Unix seconds that never go back.
        started: when the attempt began; None: when its batch script did (PRETRAIN_STARTED), else this process.
        every_seconds: between lines that stay, but for those of saves.
    """

    def __init__(
        self,
        folder: Path,
        *,
        step: int,
        active: bool,
        clock: Callable[[], float] = unix_time,
        started: float | None = None,
        every_seconds: float = 5.0,
    ) -> None:
        self._active, self._path, self._clock, self._every_seconds = active, folder / FILE_NAME, clock, every_seconds
        if not active:
            return
        now = clock()
        self._first = self._step = step
        self._where, self._kind = "start-up", "start_up"
        self._marked = min(_started() if started is None else started, now)
        self._seconds = dict.fromkeys(("start_up", "productive", "waiting", "saving"), 0.0)
        start = {"started": self._marked, "submitted": submitted_at(folder)}
        self._book(now)
        self._line = _LastLine(self._path)
        self._write("start", start)

    def __enter__(self) -> Timeline:
        return self

    def __exit__(self, *_: object) -> None:
        self.end(finished=False)

    def mark(self, step: int, where: str) -> None:
        """Marks the steps applied, and the phase that begins now: data, step, evaluation or checkpoint."""
        if not self._active:
            return
        self._book(self._clock())
        first = self._where == "start-up" or self._step == self._first < step
        saves = "checkpoint" in (where, self._where)  # a line before and one after: what was saved is not lost
        self._step, self._where = step, where
        self._kind = "start_up" if step == self._first else _KINDS[where]
        due = where == "data" and self._marked - self._written >= self._every_seconds
        if first or saves or due:
            self._write("first step" if first and step > self._first else "save" if saves else "step")
        elif where != "step":  # never in the middle of a step
            self._write("step", stays=False)

    def end(self, *, finished: bool, done: bool = False) -> None:
        """Marks the end of the attempt; later calls do nothing.

        Args:
            finished: whether the phase that it is in counts.
            done: whether the run got as far as it was to: it waits for nothing from now on.
        """
        if not self._active:
            return
        now = self._clock()
        if finished:
            self._book(now)
        self._marked = now
        self._write("end", {"done": done})
        self._line.close()
        self._active = False

    def _book(self, now: float) -> None:
        self._seconds[self._kind] += now - self._marked
        self._marked = now

    def _write(self, event: str, more: Mapping[str, float | None] | None = None, *, stays: bool = True) -> None:
        line = {"event": event, "at": self._marked, "step": self._step, **self._seconds, **(more or {})}
        self._line.write(json.dumps(line), stays=stays)
        if stays:
            self._written = self._marked


class _LastLine:
    """The end of a file of lines, where the last one can be written over. What cannot be written is left out."""

    _WIDTH = 256  # bytes that a line is filled up to: it covers what it is written over

    def __init__(self, path: Path) -> None:
        self._file: int | None = None
        self._at = 0
        with suppress(OSError):
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            self._at = os.fstat(self._file).st_size
            if self._at and os.pread(self._file, 1, self._at - 1) != b"\n":  # a line that a kill tore
                self._at += os.pwrite(self._file, b"\n", self._at)

    def write(self, text: str, *, stays: bool) -> None:
        if self._file is None:
            return
        data = f"{text:<{self._WIDTH - 1}}\n".encode()
        with suppress(OSError):
            written = os.pwrite(self._file, data, self._at)
            if stays and written == len(data):
                self._at += written

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
        self._file = None


def _started() -> float:
    """When the batch script began, else this process, as far as this system tells."""
    if (told := os.environ.get("PRETRAIN_STARTED")) is not None:
        return float(told)
    try:
        ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError, IndexError):
        age = time.process_time()
    return unix_time() - max(0.0, age)


def submitted_at(folder: Path) -> float | None:
    """Unix seconds of a run's last submission to a cluster; None: there was none."""
    try:
        return float(json.loads((folder / "job" / "submitted.json").read_text())["submitted_at"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
