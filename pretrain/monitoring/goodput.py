"""Where a run's wall time went, over all its attempts: timeline.py writes it down as it goes, `book` adds it up.

Every second, as rank 0 sees it, is one of

- start_up: from an attempt's beginning to the end of its first step, which compiles and fills caches;
- productive: steps, and the evaluations that the recipe asks for;
- waiting: in the queue, between attempts, and for data;
- saving: what training waits for checkpoints;
- lost: what an attempt did after the state that the run went on from, and from its last mark to its death.

Lost is what remains of an attempt, so that the five always add up to the time between submission and end. Steps that
are skipped count as productive, and a run that is taken up again after a week has waited for a week. One that had done
all that was asked of it has not: the time until more is asked is no part of the run, nor is an attempt that found
nothing left to do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from operator import add
from pathlib import Path
from typing import Any

from data_pipeline.durable import read_lines
from pretrain.monitoring.timeline import FILE_NAME, submitted_at


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


@dataclass(frozen=True)
class _Attempt:
    """Seconds are Unix time; `end` is None where nobody wrote it down, `lines` are empty where it died too early."""

    begin: float
    end: float | None
    lines: tuple[Mapping[str, Any], ...] = ()

    @property
    def last_seen(self) -> float:
        return max((line["at"] for line in self.lines), default=self.begin)

    def later(self, seconds: float) -> _Attempt:
        """The same attempt by a clock that is so many seconds ahead."""
        if not seconds:
            return self
        lines = tuple({**line, "at": line["at"] + seconds} for line in self.lines)
        return _Attempt(self.begin + seconds, None if self.end is None else self.end + seconds, lines)

    @property
    def done(self) -> bool:
        """Whether it left nothing to do."""
        return bool(self.lines) and bool(self.lines[-1].get("done", False))

    @property
    def submitted(self) -> float:
        """When it was asked for, as far as it knew; else when it began."""
        asked = self.lines[0].get("submitted") if self.lines else None
        return self.begin if asked is None else min(asked, self.begin)


def book(
    timeline: Iterable[Mapping[str, Any]],
    attempts: Iterable[Mapping[str, Any]],
    now: float | None,
    submitted: float | None = None,
) -> Goodput:
    """Adds up a run's wall time.

    Args:
        timeline: lines of `timeline.jsonl`, in their order.
        attempts: events of `job/attempts.jsonl`, of which `start` and `end` are looked at; may be empty.
        now: Unix seconds, of a run that is at work or queued; None: of one that has ended.
        submitted: Unix seconds, of the last submission; None: there was none.
    """
    tried = _tried(list(timeline), [event for event in attempts if event.get("event") in ("start", "end")])
    if not tried:
        return Goodput()
    first = next((i for i, attempt in enumerate(tried) if attempt.lines), 0)
    reached = min(attempt.submitted for attempt in tried[: first + 1])
    total, done, behind = Goodput(), False, 0.0  # seconds that the clock of an attempt, and of `now`, is behind
    for i, attempt in enumerate(tried):
        if attempt.lines:  # one at a time has the folder: what was written before the end of the one before was not
            behind = 0.0 if attempt.lines[0]["at"] >= reached else max(behind, reached - attempt.begin)
        attempt = attempt.later(behind)
        if done:
            reached = max(reached, attempt.submitted)  # before, nothing was asked
        later = [other.lines[0]["step"] for other in tried[i + 1 :] if other.lines]
        at_work = now + behind if now is not None and i == len(tried) - 1 else None
        begin = max(reached, attempt.begin)  # clocks of different machines, or a stale PRETRAIN_STARTED
        spent, end = _spent(attempt, min(later, default=None), at_work, skipped=begin - attempt.begin)
        total += spent + Goodput(waiting=begin - reached)
        reached, done = max(end, begin), attempt.done
    if now is None:
        return total
    now += behind
    if done:
        reached = max(reached, submitted or now)
    return total + Goodput(waiting=max(0.0, now - reached))


def _tried(timeline: Sequence[Mapping[str, Any]], events: Sequence[Mapping[str, Any]]) -> list[_Attempt]:
    """Attempts by the run's own lines, in whose order they were, whatever the clock said; their ends, and those that
    wrote none, by the cluster's events.
    """
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
        until = min([end or float("inf"), *(other for other, _ in spans[i + 1 : i + 2] if other >= begin)])
        mine = [k for k, attempt in enumerate(found) if attempt.lines and begin <= attempt.lines[0]["at"] <= until]
        if not mine:
            at = next((k for k, attempt in enumerate(found) if attempt.begin > begin), len(found))
            found.insert(at, _Attempt(begin, end))
        elif found[mine[-1]].end is None:
            found[mine[-1]] = replace(found[mine[-1]], end=end)
    return _that_had_work(found)


def _that_had_work(attempts: Iterable[_Attempt]) -> list[_Attempt]:
    """Leaves out those which found that one before them had left nothing to do."""
    kept: list[_Attempt] = []
    for attempt in attempts:
        nothing = attempt.done and attempt.lines[0]["step"] == attempt.lines[-1]["step"]
        if not (nothing and kept and kept[-1].done):
            kept.append(attempt)
    return kept


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
    return book(timeline, attempts, now, submitted_at(run)) if timeline or attempts else None
