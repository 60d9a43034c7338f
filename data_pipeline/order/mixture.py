"""The order of several data sets read together, each with its share of the samples.

A pattern of 2^16 slots says which source each position takes its sample from; it repeats for ever. Source s
has n_s of the slots, in proportion to the weights, spread by a keyed permutation. Position p is slot
`p % 2^16`, and if c slots of the pattern before it are the source's too, then it is position
`(p // 2^16) n_s + c` of the source, which has an order (order.py), and with it epochs, of its own. So each
source's positions follow one another without a gap, and where a run stands is still one integer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.order import keyed
from data_pipeline.order.order import Integers, Order

PERIOD = 2**16

_PATTERN = 3  # what a key is for, beside those of order.py


class MixedOrder:
    """The order of a mixture under one seed.

    A step's positions are sorted by (stream, source, position in the source): every rank has its share of every
    source, and reads few streams of each.

    Args:
        orders: of the sources, all with as many read streams.
        slots: n_s, of each source in the pattern; they sum to the period.
        seed: of the pattern.
    """

    def __init__(self, orders: Sequence[Order], slots: Integers, *, seed: int) -> None:
        self.orders, self.slots = tuple(orders), slots
        self._first = np.cumsum([0, *(order.num_samples for order in orders)])  # index of each source's first sample
        period = int(slots.sum())
        spread = keyed.permute(np.arange(period), np.array([period]), keyed.key_of(_PATTERN, seed))
        self._source = np.searchsorted(np.cumsum(slots), spread, side="right")
        self._before = np.empty(period, np.int64)  # of each slot: slots of the same source before it
        for number in range(len(orders)):
            own = np.flatnonzero(self._source == number)
            self._before[own] = np.arange(len(own))

    def split(self, positions: Integers) -> tuple[Integers, Integers]:
        """(number of the source, position in it) of each position, both [n]."""
        repeats, slot = np.divmod(positions, len(self._source))
        source = self._source[slot]
        return source, repeats * self.slots[source] + self._before[slot]

    def step_positions(self, cursor: int, global_size: int, rank: int = 0, world_size: int = 1) -> Integers:
        positions = cursor + np.arange(global_size, dtype=np.int64)
        source, inner = self.split(positions)
        positions = positions[np.lexsort((inner, source, inner % self.orders[0].read_streams))]
        local_size = global_size // world_size
        return positions[rank * local_size : (rank + 1) * local_size]

    def locate(self, positions: Integers) -> Integers:
        source, inner = self.split(positions)
        indices = np.empty_like(inner)
        for number in np.unique(source):
            rows = source == number
            indices[rows] = self._first[number] + self.orders[number].locate(inner[rows])
        return indices

    def epochs(self, positions: Integers) -> Integers:
        source, inner = self.split(positions)
        epochs: Integers = inner // np.array([order.num_samples for order in self.orders])[source]
        return epochs

    def stand_ins(self, position: int) -> Iterator[int]:
        """From the same source, as its own order has them."""
        source, inner = (int(column[0]) for column in self.split(np.array([position])))
        for i in self.orders[source].stand_ins(inner):
            yield int(self._first[source]) + i


def slots_of_pattern(weights: Sequence[float], names: Sequence[str]) -> Integers:
    """Slots of the pattern for each weight, by largest remainder; they sum to the period."""
    if not weights:
        raise DataError(where="mixture", expected="at least one data set", found="none")
    total = sum(map(Fraction, weights))
    shares = [Fraction(weight) / total * PERIOD for weight in weights]
    slots = np.array([math.floor(share) for share in shares], np.int64)
    by_remainder = sorted(range(len(shares)), key=lambda s: math.floor(shares[s]) - shares[s])
    slots[by_remainder[: PERIOD - int(slots.sum())]] += 1
    if not slots.all():
        lost = int(np.flatnonzero(slots == 0)[0])
        raise DataError(
            where=f"weight of {names[lost]}",
            expected=f"about 1/{PERIOD} of the sum of all weights, or more",
            found=f"{weights[lost]:g}",
            fix="Raise it, or leave the data set out.",
        )
    return slots
