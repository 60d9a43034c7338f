"""Where a run's wall time went, over all its attempts: `Timeline` writes it down as it goes, `book` adds it up.

Every second, as rank 0 sees it, is one of

- start_up: from an attempt's beginning to the end of its first step, which compiles and fills caches;
- productive: steps, and the evaluations that the recipe asks for;
- waiting: in the queue, between attempts, and for data;
- saving: what training waits for checkpoints;
- lost: what an attempt did after the state that the run went on from, and from its last mark to its death.

Lost is what remains of an attempt, so that the five always add up to the time between submission and end. Steps that
are skipped count as productive, and a run that is taken up again after a week has waited for a week.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, astuple, dataclass, replace
from operator import add
from pathlib import Path
from typing import Any

from data_pipeline.durable import append_line, read_lines

FILE_NAME = "timeline.jsonl"
_KINDS = {"data": "waiting", "step": "productive", "evaluation": "productive", "checkpoint": "saving"}
_UNIX = time.time() - time.monotonic()


@dataclass(frozen=True)
class Goodput:
    """Seconds of a run's wall time, by what they went to."""

    start_up: float = 0.0
    productive: float = 0.0
    waiting: float = 0.0
    saving: float = 0.0
    lost: float = 0.0

    def __add__(self, other: Goodput) -> Goodput:
        return Goodput(*map(add, astuple(self), astuple(other)))

    @property
    def total(self) -> float:
        return self.start_up + self.productive + self.waiting + self.saving + self.lost

    @property
    def share(self) -> float:
        """The share of the time that was productive; 0 where there is none."""
        return self.productive / self.total if self.total else 0.0

    def shares(self) -> dict[str, float]:
        """By category; they add up to 1, or are all 0."""
        return {kind: seconds / self.total if self.total else 0.0 for kind, seconds in asdict(self).items()}

    def __str__(self) -> str:
        rest = ", ".join(f"{k.replace('_', '-')} {v:.1%}" for k, v in self.shares().items() if k != "productive")
        return f"goodput {self.share:.1%} of {self.total:,.0f} s ({rest})"


def unix_time() -> float:
    """Unix seconds as the clock stood when this was imported, counted on from there: it never jumps."""
    return _UNIX + time.monotonic()


class Timeline:
    """Appends to a run's `timeline.jsonl`; on every rank but 0 it does nothing. A full disk costs lines, not the run.

    Args:
        folder: of the run.
        step: steps applied when this attempt goes on.
        active: whether this rank writes.
        clock: Unix seconds that never go back.
        started: when the attempt began; None: when its batch script did (PRETRAIN_STARTED), else this process.
        every_seconds: between lines, but for those of saves; what lies after the last one is lost with the process.
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
        start = {"started": self._marked, "submitted": _submitted(folder)}
        self._book(now)
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
        first = self._step == self._first < step
        saves = "checkpoint" in (where, self._where)  # a line before and one after: what was saved is not lost
        self._step, self._where = step, where
        self._kind = "start_up" if step == self._first else _KINDS[where]
        due = where == "data" and self._marked - self._written >= self._every_seconds  # never in the middle of a step
        if first or saves or due:
            self._write("first step" if first else "save" if saves else "step")

    def end(self, *, finished: bool) -> None:
        """Marks the end of the attempt; the phase that it is in counts if it was finished. Later calls do nothing."""
        if not self._active:
            return
        now = self._clock()
        if finished:
            self._book(now)
        self._marked = now
        self._write("end")
        self._active = False

    def _book(self, now: float) -> None:
        self._seconds[self._kind] += now - self._marked
        self._marked = now

    def _write(self, event: str, more: Mapping[str, float | None] | None = None) -> None:
        self._written = self._marked
        line = {"event": event, "at": self._marked, "step": self._step, **self._seconds, **(more or {})}
        with suppress(OSError):
            append_line(self._path, line)


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


def _submitted(folder: Path) -> float | None:
    try:
        return float(json.loads((folder / "job" / "submitted.json").read_text())["submitted_at"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


@dataclass(frozen=True)
class _Attempt:
    """Seconds are Unix time; `end` is None where nobody wrote it down, `lines` are empty where it died too early."""

    begin: float
    end: float | None
    lines: tuple[Mapping[str, Any], ...] = ()

    @property
    def last_seen(self) -> float:
        return max((line["at"] for line in self.lines), default=self.begin)


def book(timeline: Iterable[Mapping[str, Any]], attempts: Iterable[Mapping[str, Any]], now: float | None) -> Goodput:
    """Adds up a run's wall time.

    Args:
        timeline: lines of `timeline.jsonl`, in their order.
        attempts: events of `job/attempts.jsonl`, of which `start` and `end` are looked at; may be empty.
        now: Unix seconds, of a run that is at work or queued; None: of one that has ended.
    """
    tried = _tried(list(timeline), [event for event in attempts if event.get("event") in ("start", "end")])
    if not tried:
        return Goodput()
    submitted = [line["submitted"] for one in tried for line in one.lines[:1] if line.get("submitted") is not None]
    reached = min([tried[0].begin, *submitted])
    total = Goodput()
    for i, attempt in enumerate(tried):
        later = [other.lines[0]["step"] for other in tried[i + 1 :] if other.lines]
        at_work = now if i == len(tried) - 1 else None
        begin = max(reached, attempt.begin)  # clocks of different machines, or a stale PRETRAIN_STARTED
        spent, end = _spent(attempt, min(later, default=None), at_work, skipped=begin - attempt.begin)
        total += spent + Goodput(waiting=begin - reached)
        reached = max(end, begin)
    return total + Goodput(waiting=max(0.0, now - reached)) if now is not None else total


def _tried(timeline: Sequence[Mapping[str, Any]], events: Sequence[Mapping[str, Any]]) -> list[_Attempt]:
    """Attempts by the run's own lines, their ends and those that wrote none by the cluster's events."""
    groups: list[list[Mapping[str, Any]]] = []
    for line in timeline:
        if line["event"] == "start":
            groups.append([line])
        elif groups:
            groups[-1].append(line)
    found = [_Attempt(lines[0]["started"], _own_end(lines), tuple(lines)) for lines in groups]
    spans: list[tuple[float, float | None]] = []
    for event in events:
        if event["event"] == "start":
            spans.append((event["at"], None))
        elif spans and spans[-1][1] is None:
            spans[-1] = (spans[-1][0], event["at"])
    for i, (begin, end) in enumerate(spans):
        until = min([end or float("inf"), *(other for other, _ in spans[i + 1 : i + 2])])
        mine = [k for k, attempt in enumerate(found) if attempt.lines and begin <= attempt.lines[0]["at"] <= until]
        if not mine:
            found.append(_Attempt(begin, end))
        elif found[mine[-1]].end is None:
            found[mine[-1]] = replace(found[mine[-1]], end=end)
    return sorted(found, key=lambda attempt: attempt.begin)


def _own_end(lines: Sequence[Mapping[str, Any]]) -> float | None:
    return lines[-1]["at"] if lines[-1]["event"] == "end" else None


def _spent(attempt: _Attempt, keep: int | None, now: float | None, skipped: float) -> tuple[Goodput, float]:
    """What an attempt's time went to, and when it ended; `keep` is the step that a later one went on from."""
    kept = Goodput()
    first = attempt.lines[0]["step"] if attempt.lines else 0
    for line in attempt.lines:
        if keep is None or line["step"] <= max(keep, first):  # at the first step there is only start-up
            kept = Goodput(line["start_up"], line["productive"], line["waiting"], line["saving"])
    seen, end = attempt.last_seen, attempt.end
    if end is None and now is not None:  # it is at work: nothing is lost yet
        end = max(now, seen)
        going = "productive" if attempt.lines and attempt.lines[-1]["step"] > first else "start_up"
        kept += Goodput(**{going: end - seen})
    end = max(seen, end or seen)
    kept = replace(kept, start_up=max(0.0, kept.start_up - skipped))
    return replace(kept, lost=max(0.0, end - attempt.begin - skipped - kept.total)), end


def read_goodput(run: Path, now: float | None = None) -> Goodput | None:
    """Adds up the wall time of a run's folder; None where nothing was written down. `now` as for `book`."""
    timeline = [line for line in read_lines(run / FILE_NAME) if {"event", "at", "step"} <= line.keys()]
    attempts = read_lines(run / "job" / "attempts.jsonl")
    return book(timeline, attempts, now) if timeline or attempts else None
