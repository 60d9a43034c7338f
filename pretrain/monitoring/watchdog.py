"""Hang detection: when no rank makes progress, those that hold the others up are named and the job is ended.

A thread of each rank watches the main thread; a second one tells the others, through a store that rank 0 keeps, so that
both work while the main thread waits in a collective. Nothing moves where no rank that can be heard has made progress
for the timeout. Named are then

1. the ranks that cannot be heard: stopped or killed, or their node is gone;
2. else those that are behind: all ranks make the same marks in the same order;
3. else those that are at work where others wait in a collective (told by the stack; a GPU's collectives do not show);
4. else all.

Two threads, since a client waits for ever for a store that was stopped, whatever its timeout.
"""

from __future__ import annotations

import faulthandler
import json
import os
import platform
import sys
import threading
import time
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path

from torch._C._distributed_c10d import TCPStore

from data_pipeline.durable import durable_file
from pretrain.runtime.collectives import World, from_main, gather_objects
from pretrain.runtime.failure import note_failure
from pretrain.runtime.signals import HUNG

START_UP_SECONDS = 600.0  # at least, until a step is done: checkpoints are verified, models compiled, caches filled
BEATS = 8  # in a timeout
UNHEARD = 3  # beats without news, after which a rank counts as unheard
_WAITING_FILES = ("torch/distributed/", "/deepspeed/")
_STDERR = 2


@dataclass(frozen=True)
class RankStatus:
    """What a rank reports about itself.

    Attributes:
        beat: counts the reports.
        marks: how often the rank has begun another part of its work.
        step: steps applied.
        where: the part of the work that it is in.
        idle_seconds: without progress.
        waits: whether it waits in a collective.
        stack: of its main thread, innermost last; empty while the rank makes progress.
        blames: ranks because of which it is about to end.
    """

    beat: int = 0
    marks: int = 0
    step: int = 0
    where: str = "start-up"
    idle_seconds: float = 0.0
    waits: bool = False
    stack: tuple[str, ...] = ()
    blames: tuple[int, ...] = ()


def stalled_ranks(statuses: Mapping[int, RankStatus], unheard: Set[int]) -> list[int]:
    """Finds which of the ranks, none of which makes progress, hold the others up.

    Args:
        statuses: the newest of each rank.
        unheard: ranks that cannot be heard any more.
    """
    if named := next((status.blames for status in statuses.values() if status.blames), ()):
        return list(named)  # as the first rank that saw it: others may be unheard because they have ended
    if unheard:
        return sorted(unheard)
    least = min(status.marks for status in statuses.values())
    behind = [rank for rank, status in statuses.items() if status.marks == least]
    if len(behind) < len(statuses):
        return sorted(behind)
    return sorted(rank for rank, status in statuses.items() if not status.waits) or sorted(statuses)


class Watchdog:
    """Watches the thread that makes it, for the duration of a `with` block.

    Ends the process with status HUNG within twice the timeout after the last progress (START_UP_SECONDS at least, until
    the first step is done). Time in which the whole process is stopped does not count as its own.

    Args:
        world: this process among the ranks; every rank makes and enters one.
        timeout: seconds; None: nothing is watched.
        folder: of the run; what was found goes to `job/hang-RANK.json` where there is a `job`.
    """

    def __init__(self, world: World, timeout: float | None, folder: Path) -> None:
        self._world, self._folder = world, folder
        self._nodes: list[str] = []
        self._timeout = timeout if timeout is not None else float("inf")
        self._beat_seconds = min(max(self._timeout / BEATS, 0.2), 10.0)
        self._patience = max(self._timeout, START_UP_SECONDS)
        self._first_step: int | None = None
        self._mark = (0, 0, "start-up")  # how many, step, where: replaced as one, since other threads read it
        self._signs = 0
        self._thread = threading.get_ident()
        self._status = RankStatus()
        self._over = threading.Event()
        self._board: _Board | None = None
        self._watcher = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if self._timeout == float("inf"):
            return self
        self._nodes = gather_objects(os.environ.get("SLURMD_NODENAME") or platform.node())
        if self._world.size > 1:
            self._board = _Board(self._world)
            threading.Thread(target=self._talk, args=(self._board,), name="watchdog status", daemon=True).start()
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._watcher.is_alive():
            self._watcher.join()  # or it might arm once more
            faulthandler.cancel_dump_traceback_later()

    def progress(self, step: int, where: str) -> None:
        """Marks progress: the steps applied, and the part of the work that begins now. Every rank calls it alike."""
        if self._first_step is None:
            self._first_step = step
        elif step > self._first_step and self._patience > self._timeout:
            self._patience = self._timeout
            self._arm()
        self._mark = (self._mark[0] + 1, step, where)
        self._signs += 1

    def alive(self) -> None:
        """Marks progress within what was begun; any rank may call it at any time."""
        self._signs += 1

    def _watch(self) -> None:
        """Counts beats, not seconds, so that a process that was stopped for an hour is not found hanging afterwards."""
        beat, idle, signs, exchanges, unanswered = 0, 0, -1, 0, 0
        while not self._over.wait(self._beat_seconds):
            self._arm()
            beat, idle, signs = beat + 1, idle + 1 if signs == self._signs else 0, self._signs
            self._status = self._look(beat, idle * self._beat_seconds)
            if self._board is not None:
                unanswered = unanswered + 1 if exchanges == self._board.exchanges else 0
                exchanges = self._board.exchanges
            told = self._board is not None and any(status.blames for status in self._board.statuses.values())
            if told or self._status.idle_seconds >= self._patience:
                self._judge(self._board is not None and unanswered >= UNHEARD)

    def _arm(self) -> None:
        """For a main thread that keeps the interpreter, so that no other thread runs: ends with status 1."""
        faulthandler.dump_traceback_later(2 * self._patience, exit=True, file=_STDERR)

    def _talk(self, board: _Board) -> None:
        while not self._over.wait(self._beat_seconds):
            status = self._status
            try:
                board.exchange(status, everyone=status.idle_seconds >= self._patience / 2)
            except RuntimeError:  # rank 0 is gone; that nothing is heard any more says so
                return

    def _look(self, beat: int, idle_seconds: float) -> RankStatus:
        marks, step, where = self._mark
        frame = sys._current_frames().get(self._thread) if idle_seconds >= self._patience / 2 else None
        if frame is None:
            return RankStatus(beat, marks, step, where, idle_seconds)
        waits = any(part in frame.f_code.co_filename for part in _WAITING_FILES)
        stack: list[str] = []
        while frame is not None:  # traceback's own functions would look for the files, and the disk may be what hangs
            stack.insert(0, f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}")
            frame = frame.f_back
        return RankStatus(beat, marks, step, where, idle_seconds, waits, tuple(stack))

    def _judge(self, no_store: bool) -> None:
        """Ends the process, unless a rank still moves."""
        statuses = {self._world.rank: self._status}
        unheard: set[int] = set()
        if self._board is not None:
            statuses = {**self._board.statuses, **statuses}
            unheard = {0} if no_store else {rank for rank, count in self._board.repeats.items() if count >= UNHEARD}
            unheard.discard(self._world.rank)
            told = any(status.blames for status in statuses.values())
            moves = any(statuses[rank].idle_seconds < self._patience for rank in statuses.keys() - unheard)
            if moves and not told and not no_store:
                return
        blamed = stalled_ranks(statuses, unheard)
        found = [self._finding(rank, statuses[rank], rank in unheard) for rank in blamed]
        self._status = replace(self._status, blames=tuple(blamed))
        ending = time.monotonic() + (0 if self._board is None or no_store else 3.5 * self._beat_seconds)
        teller = threading.Thread(target=self._tell, args=(found,), daemon=True)
        teller.start()
        teller.join(10)  # what it writes to may be what hangs
        time.sleep(max(0.0, ending - time.monotonic()))  # until the others have heard
        os._exit(HUNG)

    def _finding(self, rank: int, status: RankStatus, unheard: bool) -> dict[str, object]:
        state = "waits in a collective" if status.waits else "in no collective"
        state += f", at {status.stack[-1]}" if status.stack else ""
        if unheard:
            if status.marks < self._status.marks:  # what was heard last is some beats old; ranks are never steps apart
                status = replace(status, step=self._status.step, where=self._status.where)
            state = "not heard of any more: stopped or killed, or its node is gone"
        seconds = max(status.idle_seconds, self._status.idle_seconds)
        line = (
            f"rank {rank} on {self._nodes[rank]} has made no progress for {seconds:.0f} s: "
            f"step {status.step}, in {status.where} ({state})"
        )
        return {"rank": rank, "node": self._nodes[rank], "state": state, "line": line, **asdict(status)}

    def _tell(self, found: Sequence[Mapping[str, object]]) -> None:
        for one in found:
            stack = one["stack"] if one["rank"] != self._world.rank else ()  # its own is in the dump below
            assert isinstance(stack, tuple)
            print("\n  ".join([str(one["line"]), *stack]), file=sys.stderr, flush=True)
        faulthandler.dump_traceback(file=_STDERR, all_threads=True)
        note_failure(self._folder, str(found[0]["line"]), rank=self._world.rank)
        if (self._folder / "job").is_dir():
            with durable_file(self._folder / "job" / f"hang-{self._world.rank}.json") as file:
                file.write(json.dumps({"at": time.time(), "found": found}, indent=1).encode())


class _Board:
    """Every rank's newest status, as far as it was heard: of rank 0 always, of the others when something is wrong."""

    def __init__(self, world: World) -> None:
        self.statuses = {rank: RankStatus() for rank in range(world.size)}
        self.repeats = dict.fromkeys(self.statuses, 0)  # how often in a row the same was heard
        self.exchanges = 0
        self._rank = world.rank
        patience = timedelta(seconds=60)
        address, port = os.environ["MASTER_ADDR"], 0
        if world.is_main:
            store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=patience)
            for rank, status in self.statuses.items():  # so that nobody waits for what was never written
                store.set(str(rank), json.dumps(asdict(status)))
            port = store.port
        port = from_main(port)
        if not world.is_main:
            store = TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=patience)
        self._store = store

    def exchange(self, status: RankStatus, everyone: bool) -> None:
        """May never return."""
        self._store.set(str(self._rank), json.dumps(asdict(status)))
        ranks = sorted(self.statuses) if everyone else [0]
        for rank, text in zip(ranks, self._store.multi_get([str(rank) for rank in ranks]), strict=True):
            told = json.loads(text)
            heard = RankStatus(**{**told, "stack": tuple(told["stack"]), "blames": tuple(told["blames"])})
            self.repeats[rank] = self.repeats[rank] + 1 if heard.beat == self.statuses[rank].beat else 0
            self.statuses[rank] = heard
        self.exchanges += 1
