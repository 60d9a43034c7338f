"""Every second of a run is booked once, whatever sequence of attempts, saves and kills it was."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, astuple, dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.durable import read_lines
from pretrain.monitoring.goodput import Goodput, book, read_goodput
from pretrain.monitoring.timeline import FILE_NAME, Timeline

SECONDS = st.floats(0.001, 1000)


@dataclass(frozen=True)
class Step:
    data: float
    step: float
    evaluation: float | None
    save: float | None


@dataclass(frozen=True)
class Attempt:
    """`killed` seconds into what follows its last step; None: it ends by itself, with a save, as the loop does.

    `told`: the cluster wrote its end.
    """

    queued: float
    start_up: float
    steps: list[Step]
    killed: float | None
    told: bool
    torn: bool
    lost_saves: int  # of the newest, which turn out damaged


ATTEMPTS = st.lists(
    st.builds(
        Attempt, SECONDS, SECONDS,
        st.lists(st.builds(Step, SECONDS, SECONDS, st.none() | SECONDS, st.none() | SECONDS), max_size=8),
        st.none() | SECONDS, st.booleans(), st.booleans(), st.integers(0, 3),
    ),
    min_size=1, max_size=5,
)  # fmt: skip


@dataclass
class Run:
    """Lives through attempts with a clock of its own, and keeps its own books, second by second."""

    folder: Path
    now: float = 1e9
    events: list[dict[str, Any]] = field(default_factory=list)
    saved: list[int] = field(default_factory=lambda: [0])
    # For each attempt, what it spent: (seconds, kind, steps applied at the end of it).
    spent: list[list[tuple[float, str, int]]] = field(default_factory=list)
    waited: float = 0.0
    resumed: list[int] = field(default_factory=list)
    unknown: float = 0.0  # after the last line of an attempt whose end nobody told

    def live(self, attempt: Attempt, every_seconds: float) -> None:
        self.waited += self.unknown + attempt.queued
        self.unknown = 0.0
        self.now += attempt.queued
        begun, step = self.now, self.saved[-1]
        self.resumed.append(step)
        spent: list[tuple[float, str, int]] = []
        self.spent.append(spent)
        self.events.append({"event": "start", "at": begun, "attempt": len(self.resumed)})
        self.now += attempt.start_up / 2
        line = Timeline(
            self.folder, step=step, active=True, clock=lambda: self.now, started=begun, every_seconds=every_seconds
        )
        self.now += attempt.start_up / 2
        spent.append((attempt.start_up, "start_up", step))
        first = step
        for i, one in enumerate(attempt.steps, 1):
            save = one.save or (1.0 if attempt.killed is None and i == len(attempt.steps) else None)
            for where, seconds in (("data", one.data), ("step", one.step)):
                line.mark(step, where)
                self.now += seconds
                kind = "start_up" if step == first else {"data": "waiting", "step": "productive"}[where]
                spent.append((seconds, kind, step + 1))
            step += 1
            for where, kind, some in (
                ("evaluation", "productive", one.evaluation),
                ("checkpoint", "saving", save),
            ):
                if some is not None:
                    line.mark(step, where)
                    self.now += some
                    spent.append((some, kind, step))
            if save is not None:
                self.saved.append(step)
        if attempt.killed is None:
            line.end(finished=True)
        else:
            line.mark(step, "data")
            self.now += attempt.killed
            if attempt.told:
                spent.append((attempt.killed, "lost", step))
                self.events.append({"event": "end", "at": self.now, "attempt": len(self.resumed)})
            else:
                self.unknown = attempt.killed
            if attempt.torn:
                with (self.folder / FILE_NAME).open("a") as file:
                    file.write('{"event": "st')
        self.saved = self.saved[: max(1, len(self.saved) - attempt.lost_saves)]

    def expected(self) -> Goodput:
        """A second counts where no later attempt went on from before it; those before the first step always."""
        seconds = dict.fromkeys(asdict(Goodput()), 0.0)
        seconds["waiting"] = self.waited
        for i, spent in enumerate(self.spent):
            keep = min(self.resumed[i + 1 :], default=10**9)
            for some, kind, step in spent:
                seconds[kind if step <= max(keep, self.resumed[i]) else "lost"] += some
        return Goodput(**seconds)


def lived(folder: str, attempts: list[Attempt], every_seconds: float) -> Run:
    run = Run(Path(folder))
    for attempt in attempts:
        run.live(attempt, every_seconds)
    (run.folder / "job").mkdir()
    (run.folder / "job" / "attempts.jsonl").write_text("".join(json.dumps(event) + "\n" for event in run.events))
    return run


@settings(max_examples=100, deadline=None)
@given(ATTEMPTS, st.floats(0, 3000))
def test_every_second_is_booked_once(attempts: list[Attempt], every_seconds: float) -> None:
    """However seldom a line is to stay, nothing is lost but what was done again, and what a kill cut short."""
    with tempfile.TemporaryDirectory() as folder:
        run = lived(folder, attempts, every_seconds)
        found = read_goodput(run.folder)
        assert found is not None
        begun = 1e9 + attempts[0].queued
        assert found.total == pytest.approx(run.now - run.unknown - begun, rel=1e-6, abs=1e-4)
        expected = run.expected()
        expected = Goodput(**{**asdict(expected), "waiting": expected.waiting - attempts[0].queued})
        assert astuple(found) == pytest.approx(astuple(expected), rel=1e-5, abs=1e-4)


@settings(max_examples=100, deadline=None)
@given(ATTEMPTS, st.floats(0, 3000), SECONDS)
def test_a_run_that_is_at_work_adds_up_to_now(attempts: list[Attempt], every_seconds: float, later: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = lived(folder, attempts, every_seconds)
        found = read_goodput(run.folder, run.now + later)
        assert found is not None
        assert min(astuple(found)) >= 0
        assert found.total == pytest.approx(run.now + later - 1e9 - attempts[0].queued, rel=1e-6, abs=1e-4)


def test_what_a_kill_took_is_lost_though_no_line_was_due(tmp_path: Path) -> None:
    """Ten quick steps after a save, then SIGKILL; the run goes on a minute later from its save."""
    step = Step(data=0.0, step=0.1, evaluation=None, save=None)
    steps = [*[step] * 9, Step(data=0.0, step=0.1, evaluation=None, save=0.5), *[step] * 10]
    run = Run(tmp_path)
    run.live(Attempt(0.0, 2.0, steps, killed=0.05, told=False, torn=False, lost_saves=0), 5)
    assert len(read_lines(tmp_path / FILE_NAME)) == 6, (
        "start, before and after the first step, before and after the save, where it was"
    )
    run.live(Attempt(60.0, 2.0, [step] * 10, killed=None, told=False, torn=False, lost_saves=0), 5)
    found = read_goodput(tmp_path)
    assert found is not None
    assert found.lost == pytest.approx(1.0)
    assert found.waiting == pytest.approx(60.05)


def attempt(folder: Path, begin: float, steps: range, *, done: bool) -> None:
    """Ten seconds of start-up, and one for each step."""
    now = begin + 10
    line = Timeline(folder, step=steps.start, active=True, clock=lambda: now, started=begin)
    for step in steps:
        line.mark(step, "step")
        now += 1
        line.mark(step + 1, "data")
    line.end(finished=True, done=done)


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("killed", [None, 7.0])
def test_a_clock_that_goes_back_between_attempts_takes_nothing(
    tmp_path: Path, told: bool, killed: float | None
) -> None:
    """As where a node's clock is wrong, or was before: what was done is that of a run with a sound clock."""
    steps = [Step(1.0, 10.0, 5.0, 2.0), Step(1.0, 10.0, None, None)]
    found = []
    for jumps in ([0.0, 0.0, 0.0], [-3600.0, 0.0, 0.0], [-3600.0, 3600.0, -7200.0]):
        run = Run(tmp_path / str(len(found)))
        run.folder.mkdir()
        for jump in (0.0, *jumps):
            run.now += jump
            run.live(Attempt(0.5, 20.0, steps, killed, told=told, torn=False, lost_saves=0), 1.0)
        events = run.events if told else []
        found.append(book(read_lines(run.folder / FILE_NAME), events, run.now + 30.0))
    sound, *others = found
    for other in others:
        for kind in ("start_up", "productive", "saving", "lost"):
            assert getattr(other, kind) == pytest.approx(getattr(sound, kind), abs=0.1), kind
        corrected = 3600 if other is others[1] else 0  # a clock that is put right looks like a wait
        assert other.total == pytest.approx(sound.total, abs=corrected + 10), "but for the time in between"


@pytest.mark.parametrize(("done", "waited"), [(True, 0.0), (False, 10_000.0)])
def test_a_run_that_was_done_waits_for_nothing(tmp_path: Path, done: bool, waited: float) -> None:
    """It is given again, which finds nothing to do, and then for ten more steps; one that was stopped did wait."""
    attempt(tmp_path, 1_000, range(0, 91), done=done)
    first = Goodput(start_up=11, productive=90)
    assert read_goodput(tmp_path) == first
    if done:
        for again in (2_000, 3_000):
            attempt(tmp_path, again, range(91, 91), done=True)
            assert read_goodput(tmp_path) == first, "given again"
    attempt(tmp_path, 11_101, range(91, 102), done=True)
    longer = first + Goodput(start_up=11, productive=10, waiting=waited)
    assert read_goodput(tmp_path) == longer


def test_a_longer_run_waits_from_its_submission_on(tmp_path: Path) -> None:
    attempt(tmp_path, 1_000, range(0, 91), done=True)
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "submitted.json").write_text('{"submitted_at": 5000}')
    first = Goodput(start_up=11, productive=90)
    assert read_goodput(tmp_path, now=5_040) == first + Goodput(waiting=40), "it is in the queue"
    attempt(tmp_path, 5_060, range(91, 102), done=True)
    assert read_goodput(tmp_path) == first + Goodput(start_up=11, productive=10, waiting=60)


def test_where_the_disk_is_full_lines_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    line = Timeline(tmp_path, step=0, active=True)
    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        line.mark(1, "checkpoint")
    line.mark(2, "checkpoint")
    line.end(finished=True)
    assert [one["step"] for one in read_lines(tmp_path / FILE_NAME)] == [0, 2, 2]


def lines(*marks: tuple[str, float, int, float, float]) -> Iterator[dict[str, Any]]:
    for event, at, step, start_up, productive in marks:
        seconds = {"start_up": start_up, "productive": productive, "waiting": 0.0, "saving": 0.0}
        yield {"event": event, "at": at, "step": step, "started": 100.0, "submitted": 40.0, **seconds}


def test_the_queue_before_the_first_attempt_is_waiting() -> None:
    found = book(lines(("start", 110, 0, 10, 0), ("end", 150, 4, 15, 35)), [], None)
    assert found == Goodput(start_up=15, productive=35, waiting=60)
    assert str(found) == "goodput 31.8% of 110 s (start-up 13.6%, waiting 54.5%, saving 0.0%, lost 0.0%)"


def test_one_that_is_at_work_has_lost_nothing_yet() -> None:
    told = list(lines(("start", 110, 0, 10, 0), ("first step", 115, 1, 15, 0), ("step", 120, 2, 15, 5)))
    begun = [{"event": "start", "at": 101.0, "attempt": 0}]
    ended = [*begun, {"event": "end", "at": 130.0, "attempt": 0}]
    assert book(told[:1], begun, 114) == Goodput(start_up=14, waiting=60)
    assert book(told, begun, 127) == Goodput(start_up=15, productive=12, waiting=60)
    assert book(told, ended, None) == Goodput(start_up=15, productive=5, waiting=60, lost=10)
    assert book(told, ended, 150) == Goodput(start_up=15, productive=5, waiting=80, lost=10), "it is queued again"


def test_an_attempt_that_died_before_it_wrote_is_lost() -> None:
    events = [
        {"event": "start", "at": 50.0, "attempt": 0},
        {"event": "end", "at": 70.0, "attempt": 0},
        {"event": "requeue", "at": 71.0, "attempt": 0},
        {"event": "start", "at": 100.0, "attempt": 1},
    ]
    found = book(lines(("start", 110, 0, 10, 0), ("end", 150, 4, 15, 35)), events, None)
    assert found == Goodput(start_up=15, productive=35, waiting=10 + 30, lost=20)


def test_nothing_is_no_time() -> None:
    assert book([], [], None) == Goodput()
    assert Goodput().share == 0
    assert set(Goodput().shares().values()) == {0.0}
