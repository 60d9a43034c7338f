"""Several data sets as one; in which order their samples are read: data_pipeline/order/mixture.py."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from data_pipeline.batch import Sample
from data_pipeline.datasets.classes import Relabeled, check_shared_classes, share_classes
from data_pipeline.datasets.dataset import Dataset, Part
from data_pipeline.datasets.read import ShardDataset
from data_pipeline.errors import DataError
from data_pipeline.order.mixture import MixedOrder, slots_of_pattern
from data_pipeline.order.order import Integers, Order, SampleOrder


def overlap_notes(dataset: Dataset) -> list[str]:
    """Sentences on sources of a mixture that have shards in common; labels or a selection beside them are a reason to.

    Args:
        dataset: a mixture, or another data set, which has no sources.
    """
    plain = [
        (part.name, part.dataset.base if isinstance(part.dataset, Relabeled) else part.dataset)
        for part in dataset.parts
    ]
    hashes = [(name, set(part.manifest.sha256)) for name, part in plain if isinstance(part, ShardDataset)]
    return [
        f"data.train: {name} shares {len(both)} of its shards with {earlier}: they are seen by the weights of both"
        for number, (name, own) in enumerate(hashes)
        for earlier, others in hashes[:number]
        if (both := own & others)
    ]


class Mixture:
    """The samples of all sources, numbered one source after the other.

    Labels are numbered as the first source has them that has the classes of all (classes.py); where none has, samples
    can be read without labels alone.

    A sample's key is `SOURCE:KEY`, SOURCE counted from 0 on: equal keys of two sources stay apart, and nothing
    that is drawn by key depends on where the data lie.

    Args:
        parts: the sources.
        by_number: whether labels without names are taken for the named ones of the same numbers.

    Raises:
        DataError: no source, or a weight that is too small a part of the whole to get a slot.
    """

    def __init__(self, parts: Sequence[Part], *, by_number: bool = False) -> None:
        self.parts, self._by_number = share_classes(parts), by_number
        self.slots = slots_of_pattern([part.weight for part in parts], [part.name for part in parts])
        datasets = [part.dataset for part in parts]
        self.shard_sizes = np.concatenate([dataset.shard_sizes for dataset in datasets])
        self.fields = tuple(sorted(set.intersection(*(set(dataset.fields) for dataset in datasets))))
        self._ends = np.cumsum([dataset.num_samples for dataset in datasets])
        self.num_samples = int(self._ends[-1])

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Those of the sources that know theirs; None where they differ."""
        known = self._lists()
        return known[0] if len(known) == 1 else None

    def check_classes(self) -> None:
        """Raises FieldError where a label means two things, or may."""
        check_shared_classes(self.parts, by_number=self._by_number)

    @property
    def label_counts(self) -> NDArray[np.int64] | None:
        """The number of classes of all sources together; None where one has no labels, or a label means two classes."""
        counts = [part.dataset.label_counts for part in self.parts]
        if len(self._lists()) > 1:
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
        return self._digest([part.dataset.fingerprint for part in self.parts])

    @cached_property
    def state(self) -> str:
        return self._digest([part.dataset.state for part in self.parts])

    def _digest(self, of_sources: Sequence[str]) -> str:
        return hashlib.sha256(json.dumps(list(zip(of_sources, self.slots.tolist(), strict=True))).encode()).hexdigest()

    @property
    def num_soft_classes(self) -> int | None:
        """That of the parts with soft labels, which `check` (assemble.py) holds to be the same in all of them."""
        found = [part.dataset.num_soft_classes for part in self.parts]
        return next((number for number in found if number is not None), None)

    def beneath(self) -> tuple[Dataset, Integers | None]:
        return self, None

    def order(self, *, seed: int, read_streams: int, shuffle_window: int) -> SampleOrder:
        """The order of the whole, made of one for each part."""
        orders = []
        for part in self.parts:
            sizes = part.dataset.shard_sizes
            if not part.dataset.num_samples:
                raise DataError(where=part.name, expected="at least one sample", found="none")
            orders.append(Order(sizes, seed=seed, read_streams=read_streams, shuffle_window=shuffle_window))
        return MixedOrder(orders, self.slots, seed=seed)

    def read(self, i: int) -> Sample:
        number, inner = self._find(i)
        sample = self.parts[number].dataset.read(inner)
        return replace(sample, key=f"{number}:{sample.key}")

    def origin(self, i: int) -> tuple[str, str]:
        number, inner = self._find(i)
        key, file = self.parts[number].dataset.origin(inner)
        return f"{number}:{key}", f"{self.parts[number].name}: {file}"

    def _lists(self) -> list[tuple[str, ...]]:
        """The different lists of classes that sources have."""
        return list(dict.fromkeys(part.dataset.classes for part in self.parts if part.dataset.classes is not None))

    def _find(self, i: int) -> tuple[int, int]:
        if not 0 <= i < self.num_samples:
            raise IndexError(f"sample {i} of {self.num_samples}")
        number = int(self._ends.searchsorted(i, side="right"))
        return number, i - int(self._ends[number] - self.parts[number].dataset.num_samples)
