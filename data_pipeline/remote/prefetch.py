"""Shards from afar, fetched before the step that reads them: the order is arithmetic, so what comes is known."""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import count
from typing import NamedTuple, Protocol, TypeVar

import numpy as np

from data_pipeline.errors import DataError, PretrainError
from data_pipeline.order.order import Integers, SampleOrder
from data_pipeline.remote.config import CacheConfig
from data_pipeline.remote.fetch import stop_thread_with

_THREADS = 4
_LONGEST_GOODBYE = 2.0  # seconds; only a server that is silent makes it long
_SAMPLES_AT_ONCE = 16_384  # looked at together, to spare Python's overhead


class Stepped(Protocol):
    """What a step is to whoever fetches for the next: the position that follows it."""

    @property
    def cursor(self) -> int: ...


Step = TypeVar("Step", bound=Stepped)


class Shards(Protocol):
    """Shards behind a URL, which can be fetched one by one."""

    @property
    def shard_sizes(self) -> Integers: ...
    @property
    def shard_bytes(self) -> Integers: ...
    def shards_in(self, indices: Integers) -> Integers:
        """Number of the shard that each sample lies in, [n]."""
        ...

    def fetch(self, shard: int) -> None:
        """Brings a shard and its index into the cache."""
        ...


class RemotePart(NamedTuple):
    """Shards behind a URL that samples are read from, or a selection of their samples.

    Attributes:
        shards: all of them.
        indices: the samples in them that are read, by number; None: all, in their order.
        num_samples: how many are read.
        first: number of the first of these in the whole that they are read as a part of.
        cache: where the shards are kept.
    """

    shards: Shards
    indices: Integers | None
    num_samples: int
    first: int
    cache: CacheConfig

    def shards_in(self, own: Integers) -> Integers:
        """The shard that each sample, by its number in this part, lies in."""
        return self.shards.shards_in(own if self.indices is None else self.indices[own])


def check_room(
    parts: Sequence[RemotePart],
    *,
    read_streams: int,
    shuffle_window: int,
    world_size: int,
    local_size: int,
    repeats: int = 1,
) -> None:
    """See that the cache holds what is read at once, and one shard a stream besides; else it would be fetched anew
    in every step.

    Args:
        read_streams, shuffle_window: of the order.
        world_size: ranks; each reads about `read_streams / world_size` of them.
        local_size: of them on this machine, sharing the cache.
        repeats: of each sample (repeats.py); a rank's piece of a step runs through the streams of each.

    Raises:
        DataError: it does not.
    """
    streams_here = min(read_streams, local_size * repeats * _streams_of_rank(read_streams, world_size))
    needed = sum(streams_here * _bytes_of_stream(part, shuffle_window) for part in parts)
    total = sum(int(part.shards.shard_bytes.sum()) for part in parts)
    needed = min(needed, total)
    if parts and needed > parts[0].cache.max_bytes:
        raise DataError(
            where="data.cache.max_gb",
            expected=f"at least {needed / 1e9:.3g}: {streams_here} streams are read side by side here, each in several "
            f"shards of up to {max(int(part.shards.shard_bytes.max()) for part in parts) / 1e6:,.3g} MB",
            found=f"{parts[0].cache.max_gb:g}",
            fix="Raise it, lower data.read_streams, or make smaller shards.",
        )


def prefetched(
    steps: Iterator[Step],
    parts: Sequence[RemotePart],
    order: SampleOrder,
    *,
    cursor: int,
    read_streams: int,
    global_size: int,
    rank: int,
    world_size: int,
) -> Iterator[Step]:
    """The same steps, while threads fetch what comes after them.

    Args:
        steps: from `cursor` on. They, or the processes that make them, fetch for themselves what is not there yet.
        parts: of the data set that the steps are read from.
        order, read_streams, global_size, rank, world_size: as of the loader.
    """
    if not parts:
        yield from steps
        return
    coming = _coming(parts, order, cursor, read_streams, global_size, rank, world_size)
    first = next(steps, None)  # by now worker processes have been forked, which threads would disturb
    if first is None:
        return
    with closing(Prefetcher(coming, _streams_of_rank(read_streams, world_size) * len(parts))) as prefetcher:
        yield first
        for step in steps:
            prefetcher.reached(step.cursor)
            yield step


class Fetch(NamedTuple):
    """One shard to fetch, with its index."""

    shards: Shards
    shard: int

    def __call__(self) -> None:
        self.shards.fetch(self.shard)


class Prefetcher:
    """Threads that fetch, in order, at most so many that no step has come to yet.

    What cannot be fetched is left to whoever reads it, to tell.

    Args:
        coming: (position of the step that needs it first, fetch), in order, without end; None in place of a fetch
            once in a while, so that looking ahead has an end where nothing is to be fetched any more.
        ahead: how many.
    """

    def __init__(self, coming: Iterator[tuple[int, Fetch | None]], ahead: int) -> None:
        self._coming, self._ahead = coming, ahead
        self._planning = threading.Lock()
        self._moved = threading.Condition()
        self._waiting: list[int] = []  # positions that need what was planned, as far as they were not reached
        self._reached = 0
        self._stop = threading.Event()
        names = [f"prefetch-{number}" for number in range(min(_THREADS, ahead))]
        self._threads = [threading.Thread(target=self._work, name=name, daemon=True) for name in names]
        for thread in self._threads:
            thread.start()

    def reached(self, cursor: int) -> None:
        """All steps before this position were made."""
        with self._moved:
            self._reached = cursor
            self._waiting = [position for position in self._waiting if position >= cursor]
            self._moved.notify_all()

    def close(self) -> None:
        self._give_up()
        for thread in self._threads:  # one that is at work when the interpreter ends could bring it down
            thread.join(_LONGEST_GOODBYE)

    def _give_up(self) -> None:
        self._stop.set()
        with self._moved:
            self._moved.notify_all()

    def _work(self) -> None:
        stop_thread_with(self._stop)
        while (planned := self._next()) is not None:
            try:
                for fetch in planned:
                    fetch()
            except PretrainError:
                self._give_up()

    def _next(self) -> tuple[Fetch, ...] | None:
        """What is to be fetched now, if anything; None: no more."""
        with self._planning:
            with self._moved:
                self._moved.wait_for(lambda: self._stop.is_set() or len(self._waiting) < self._ahead)
                if self._stop.is_set():
                    return None
            position, fetch = next(self._coming)
            with self._moved:
                if position >= self._reached:  # else the step was made meanwhile
                    self._waiting.append(position)
        return () if fetch is None else (fetch,)


def _coming(
    parts: Sequence[RemotePart],
    order: SampleOrder,
    cursor: int,
    read_streams: int,
    global_size: int,
    rank: int,
    world_size: int,
) -> Iterator[tuple[int, Fetch | None]]:
    """Shards as a rank's steps come to them, each once while it stays among those that came last; and None, after
    so many steps, for the last of them.
    """
    local_size = global_size // world_size
    epoch = min(part.num_samples for part in parts)  # within less than half of one no shard comes twice
    num_steps = max(1, min(_SAMPLES_AT_ONCE // local_size, epoch // 2 // global_size))
    recent: OrderedDict[Fetch, None] = OrderedDict()
    for start in count(cursor, num_steps * global_size):
        cursors = range(start, start + num_steps * global_size, global_size)
        indices = order.locate(
            np.concatenate([order.step_positions(c, global_size, rank, world_size) for c in cursors])
        )
        for at, fetch in sorted(_first_uses(parts, indices), key=lambda use: use[0]):
            if fetch not in recent:
                yield cursors[at // local_size], fetch
            recent[fetch] = None
            recent.move_to_end(fetch)
            while len(recent) > 4 * read_streams * len(parts):
                recent.popitem(last=False)
        yield cursors[-1], None


def _first_uses(parts: Sequence[RemotePart], indices: Integers) -> Iterator[tuple[int, Fetch]]:
    """(where in `indices` it is used first, the shard) of each shard of a part."""
    for part in parts:
        rows = np.flatnonzero((indices >= part.first) & (indices < part.first + part.num_samples))
        shards, at = np.unique(part.shards_in(indices[rows] - part.first), return_index=True)
        yield from zip(rows[at].tolist(), (Fetch(part.shards, shard) for shard in shards.tolist()), strict=True)


def _streams_of_rank(read_streams: int, world_size: int) -> int:
    return min(read_streams, math.ceil(read_streams / world_size) + (world_size > 1))  # a cut may lie inside a stream


def _bytes_of_stream(part: RemotePart, shuffle_window: int) -> int:
    """Names the shards that a window lies in, and those of the next window."""
    per_shard = max(1, part.num_samples // max(1, len(part.shards.shard_sizes)))
    num_shards = 1 + math.ceil((shuffle_window - 1) / per_shard) + 1
    return num_shards * int(part.shards.shard_bytes.max())
