"""Several data sets trained on together, each with its share of the samples.

A pattern of 2^16 slots says which source each position takes its sample from; it repeats for ever. Source s
has n_s of the slots, in proportion to the weights, spread by a keyed permutation. Position p is slot
`p % 2^16`, and if c slots of the pattern before it are the source's too, then it is position
`(p // 2^16) n_s + c` of the source, which has an order (order.py), and with it epochs, of its own. So each
source's positions follow one another without a gap, and where a run stands is still one integer.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from data_pipeline.batch import Sample
from data_pipeline.datasets.read import Dataset, open_dataset
from data_pipeline.datasets.selection import Selected, soft_classes
from data_pipeline.datasets.soft_labels import SoftLabelled, open_labels
from data_pipeline.errors import DataError, FieldError
from data_pipeline.order import keyed
from data_pipeline.order.order import Integers, Order, SampleOrder
from data_pipeline.remote.cache import DEFAULT, CacheSpec

PERIOD = 2**16

_PATTERN = 3  # what a key is for, beside those of order.py


@dataclass(frozen=True)
class Source:
    """One data set of a mixture.

    Attributes:
        name: what messages call it: its path.
        dataset: where its samples are.
        weight: its share of the samples is this over the sum of all weights.
    """

    name: str
    dataset: Dataset
    weight: float


class Mixture:
    """The samples of all sources, numbered one source after the other.

    A sample's key is `SOURCE:KEY`, SOURCE counted from 0 on: equal keys of two sources stay apart, and nothing
    that is drawn by key depends on where the data lie.

    Raises:
        DataError: no source, or a weight that is too small a part of the whole to get a slot.
    """

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = tuple(sources)
        self.slots = _slots([source.weight for source in sources], [source.name for source in sources])
        datasets = [source.dataset for source in sources]
        self.shard_sizes = np.concatenate([dataset.shard_sizes for dataset in datasets])
        self.fields = tuple(sorted(set.intersection(*(set(dataset.fields) for dataset in datasets))))
        self._ends = np.cumsum([dataset.num_samples for dataset in datasets])
        self.num_samples = int(self._ends[-1])

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Those of the sources that know theirs; None where they differ."""
        known = [source.dataset.classes for source in self.sources if source.dataset.classes is not None]
        return known[0] if known and self._differing() is None else None

    def check_classes(self) -> None:
        """Raises FieldError where two sources have different classes, so that a label means two things."""
        if (differing := self._differing()) is not None:
            raise _different_classes(*differing)

    @property
    def label_counts(self) -> NDArray[np.int64] | None:
        """Of all sources together; None where one has no labels, or a label means two classes."""
        counts = [source.dataset.label_counts for source in self.sources]
        if self._differing() is not None:
            return None
        total = np.zeros(max((0 if count is None else len(count) for count in counts), default=0), np.int64)
        for count in counts:
            if count is None:
                return None
            total[: len(count)] += count
        return total

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 in hex over the sources' own and their shares: both decide which samples a run sees."""
        return self._digest([source.dataset.fingerprint for source in self.sources])

    @cached_property
    def state(self) -> str:
        return self._digest([source.dataset.state for source in self.sources])

    def _digest(self, of_sources: Sequence[str]) -> str:
        return hashlib.sha256(json.dumps(list(zip(of_sources, self.slots.tolist(), strict=True))).encode()).hexdigest()

    def read(self, i: int) -> Sample:
        number, inner = self._find(i)
        sample = self.sources[number].dataset.read(inner)
        return replace(sample, key=f"{number}:{sample.key}")

    def origin(self, i: int) -> tuple[str, str]:
        number, inner = self._find(i)
        key, file = self.sources[number].dataset.origin(inner)
        return f"{number}:{key}", f"{self.sources[number].name}: {file}"

    def _differing(self) -> tuple[Source, Source] | None:
        known = [source for source in self.sources if source.dataset.classes is not None]
        return next(((known[0], other) for other in known if other.dataset.classes != known[0].dataset.classes), None)

    def _find(self, i: int) -> tuple[int, int]:
        if not 0 <= i < self.num_samples:
            raise IndexError(f"sample {i} of {self.num_samples}")
        number = int(self._ends.searchsorted(i, side="right"))
        return number, i - int(self._ends[number] - self.sources[number].dataset.num_samples)


class MixedOrder:
    """The order of a mixture under one seed.

    A step's positions are sorted by (lane, source, position in the source): every rank has its share of every
    source, and reads few lanes of each.

    Args:
        orders: of the sources, all with as many lanes.
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
        positions = positions[np.lexsort((inner, source, inner % self.orders[0].lanes))]
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


class Share(Protocol):
    """One entry of a list of data sets to train on."""

    @property
    def path(self) -> str: ...
    @property
    def weight(self) -> float: ...
    @property
    def labels(self) -> str | None: ...
    @property
    def select(self) -> str | None: ...


def open_training(train: str | Sequence[Share], cache: CacheSpec = DEFAULT) -> Dataset:
    """The data set at a path, as `open_dataset` takes it, or a mixture of several. One alone is itself.

    Raises:
        DataError: as `open_dataset` and `Mixture` say; soft labels or a selection are not of the data beside them.
    """
    if isinstance(train, str):
        return open_dataset(train, cache)
    if len(train) == 1:
        return _open_share(train[0], 0, cache)
    opened = [_open_share(share, number, cache) for number, share in enumerate(train)]
    return Mixture([Source(share.path, data, share.weight) for share, data in zip(train, opened, strict=True)])


def _open_share(share: Share, number: int, cache: CacheSpec) -> Dataset:
    """A data set with its soft labels, and of it what was selected."""
    dataset, where = open_dataset(share.path, cache), f"data.train.{number}"
    if share.labels is not None:
        dataset = SoftLabelled(dataset, open_labels(share.labels), f"{where}.labels")
    return dataset if share.select is None else Selected(dataset, Path(share.select), f"{where}.select")


def has_soft_labels(dataset: Dataset) -> bool:
    """Whether some samples, or all, have soft labels."""
    sources = [source.dataset for source in dataset.sources] if isinstance(dataset, Mixture) else [dataset]
    return any(soft_classes(source) is not None for source in sources)


def order_of(dataset: Dataset, *, seed: int, lanes: int, window: int) -> SampleOrder:
    """The order in which training reads a data set or mixture; raises DataError where there is no sample."""
    if not isinstance(dataset, Mixture):
        return Order(dataset.shard_sizes, seed=seed, lanes=lanes, window=window)
    orders = []
    for source in dataset.sources:
        if not source.dataset.num_samples:
            raise DataError(where=source.name, expected="at least one sample", found="none")
        orders.append(Order(source.dataset.shard_sizes, seed=seed, lanes=lanes, window=window))
    return MixedOrder(orders, dataset.slots, seed=seed)


def _slots(weights: Sequence[float], names: Sequence[str]) -> Integers:
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


def _different_classes(one: Source, other: Source) -> FieldError:
    return FieldError(
        where=f"labels of {one.name} and {other.name}",
        expected="the same classes in the same order, as label 0 must mean the same in both",
        found=f"{_shown(one.dataset.classes)} and {_shown(other.dataset.classes)}",
        fix="Convert them together, or train an objective without labels.",
    )


def _shown(classes: tuple[str, ...] | None) -> str:
    names = classes or ()
    return f"{len(names)} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
