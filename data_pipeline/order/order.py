"""Which sample stands at global position p of a run: a pure function of (shard sizes, seed, p).

No shuffle buffer and no per-sample table; nothing dropped, nothing padded: epochs are laid end to end.
With N samples, L read streams, windows of w:

1. `epoch, q = divmod(p, N)`. The shards, in a permutation keyed by (seed, epoch), laid end to end are the
   slots 0..N-1.
2. Stream `l = q % L`, its own position `j = q // L`. With `m, r = divmod(N, L)`, stream l owns the `m + (l < r)`
   slots from `l*m + min(l, r)` on: a contiguous stretch, so a stream reads few shards at a time.
3. j goes through a keyed permutation inside windows of w slots: the shuffle.
4. A step takes the B positions from its cursor on, sorted by (p % L, p), cut into W equal pieces, one a rank.

The cursor is any p, so a run may go on with another batch size or world size, or stop anywhere.
Several data sets in shares: mixture.py, whose order is made of these.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import DataError
from data_pipeline.order import keyed

Integers = NDArray[np.int64]

_SHARDS, _WINDOW = 1, 2  # what a key is for
_LAYOUTS_KEPT = 4
_LEAST_WINDOW = 64  # samples among which a stand-in is looked for


class SampleOrder(Protocol):
    """What a loader asks: all of it pure functions of positions."""

    def step_positions(self, cursor: int, global_size: int, rank: int = 0, world_size: int = 1) -> Integers:
        """This rank's positions of the step that starts at `cursor`, [B / W], in the order of rule 4."""
        ...

    def locate(self, positions: Integers) -> Integers:
        """Index of the sample at each position, [n], counted through the data set."""
        ...

    def epochs(self, positions: Integers) -> Integers:
        """How often the data set of the sample at each position was gone through before, [n]."""
        ...

    def stand_ins(self, position: int) -> Iterator[int]:
        """Indices of samples that may take the place of a bad one, the nearest first."""
        ...


class Order:
    """The order of one data set under one seed.

    Args:
        shard_sizes: samples per shard, [S]; shards may be empty.
        seed: of the shuffle.
        read_streams: L, contiguous stretches that are read side by side; may exceed N.
        shuffle_window: w, samples of a stream that are shuffled among each other.

    Raises:
        DataError: there is no sample at all.
    """

    def __init__(self, shard_sizes: Integers, *, seed: int, read_streams: int, shuffle_window: int) -> None:
        self.shard_sizes = np.asarray(shard_sizes, np.int64)
        self.num_samples = int(self.shard_sizes.sum())
        self.seed, self.read_streams, self.shuffle_window = seed, read_streams, shuffle_window
        if self.num_samples == 0:
            raise DataError(where="data set", expected="at least one sample", found="none")
        self._first = np.cumsum(self.shard_sizes) - self.shard_sizes  # index of each shard's first sample
        self._layouts: dict[int, tuple[Integers, Integers]] = {}

    def step_positions(self, cursor: int, global_size: int, rank: int = 0, world_size: int = 1) -> Integers:
        """This rank's positions of the step that starts at `cursor`, [B / W], in the order of rule 4."""
        positions = cursor + np.arange(global_size, dtype=np.int64)
        positions = positions[np.argsort(positions % self.read_streams, kind="stable")]
        local_size = global_size // world_size
        return positions[rank * local_size : (rank + 1) * local_size]

    def locate(self, positions: Integers) -> Integers:
        """Index of the sample at each position, [n], counted through the shards as the manifest has them."""
        epochs, q = np.divmod(positions, self.num_samples)
        slots = self._slots(epochs, q)
        indices = np.empty_like(slots)
        for epoch in np.unique(epochs):
            shards, ends = self._layout(int(epoch))
            rows = epochs == epoch
            at = np.searchsorted(ends, slots[rows], side="right")
            shard = shards[at]
            indices[rows] = self._first[shard] + slots[rows] - (ends[at] - self.shard_sizes[shard])
        return indices

    def epochs(self, positions: Integers) -> Integers:
        return positions // self.num_samples

    def stand_ins(self, position: int) -> Iterator[int]:
        """The samples at the positions of `replacements`."""
        for other in self.replacements(position):
            yield int(self.locate(np.array([other]))[0])

    def replacements(self, position: int) -> Iterator[int]:
        """Where to look for a stand-in: the rest of the window, from the next position on and around.

        A window may be short, as a stream's last. Then the epoch's next positions follow, around its end if
        need be, until as many were given as a whole window has, and 63 at least.
        """
        epoch, q = divmod(position, self.num_samples)
        j, stream = divmod(q, self.read_streams)
        shortest, longer = divmod(self.num_samples, self.read_streams)
        start = j - j % self.shuffle_window
        size = min(self.shuffle_window, shortest + (stream < longer) - start)
        window = [start + (j - start + step) % size for step in range(1, size)]
        others = [other * self.read_streams + stream for other in window]
        following = ((q + step) % self.num_samples for step in range(1, self.num_samples))
        beyond = (other for other in following if other not in others)
        for other in islice(chain(others, beyond), max(self.shuffle_window, _LEAST_WINDOW) - 1):
            yield epoch * self.num_samples + other

    def _slots(self, epochs: Integers, q: Integers) -> Integers:
        j, stream = np.divmod(q, self.read_streams)
        shortest, longer = divmod(self.num_samples, self.read_streams)
        window = j // self.shuffle_window
        start = window * self.shuffle_window
        size = np.minimum(self.shuffle_window, shortest + (stream < longer) - start)
        key = keyed.key_of(_WINDOW, self.seed, epochs, stream, window)
        slots: Integers = stream * shortest + np.minimum(stream, longer) + start
        return slots + keyed.permute(j - start, size, key)

    def _layout(self, epoch: int) -> tuple[Integers, Integers]:
        """Shards in the order of the epoch, and the slot at which each of them ends, both [S]."""
        layout = self._layouts.get(epoch)
        if layout is None:
            if len(self._layouts) >= _LAYOUTS_KEPT:
                self._layouts.clear()  # perhaps under the hands of another thread: each holds what it uses
            num_shards = len(self.shard_sizes)
            key = keyed.key_of(_SHARDS, self.seed, epoch)
            shards = keyed.permute(np.arange(num_shards), np.array([num_shards]), key)
            layout = self._layouts[epoch] = shards, np.cumsum(self.shard_sizes[shards])
        return layout
