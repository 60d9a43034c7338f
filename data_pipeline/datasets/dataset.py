"""What a data set is to whoever reads it, be it shards, a folder, a view of another one, or a mixture of several."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from data_pipeline.batch import Sample
from data_pipeline.order.order import Integers, Order, SampleOrder


class Dataset(Protocol):
    """What a loader needs of a data set. Samples are numbered from 0 on, through the shards in their order.

    Attributes:
        shard_sizes: samples per shard, [S] int64: what the order shuffles as a whole.
        fields: member extensions that occur.
        classes: names of the labels, where they are known.
        label_counts: samples of each label, [K] int64, where there are labels.
        fingerprint: identity of the data, hex; the same wherever they lie.
        state: identity of what lies there now, hex: what a cache goes by.
        parts: the data sets that this one is a mixture of, in the order in which its samples are numbered; one that is
            no mixture has none.
        num_soft_classes: K where samples have soft labels [K]; None: none of them has.
    """

    @property
    def num_samples(self) -> int: ...
    @property
    def shard_sizes(self) -> NDArray[np.int64]: ...
    @property
    def fields(self) -> tuple[str, ...]: ...
    @property
    def classes(self) -> tuple[str, ...] | None: ...
    @property
    def label_counts(self) -> NDArray[np.int64] | None: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def state(self) -> str: ...
    @property
    def parts(self) -> tuple[Part, ...]: ...
    @property
    def num_soft_classes(self) -> int | None: ...

    def read(self, i: int) -> Sample:
        """Sample i.

        Raises:
            SampleError: its bytes are not those of the index.
            ShardError: its file cannot be read at all.
        """
        ...

    def origin(self, i: int) -> tuple[str, str]:
        """(key, file) of sample i, for messages."""
        ...

    def beneath(self) -> tuple[Dataset, Integers | None]:
        """The data set that this one is a view of, and the index there of each of its samples, [N]; None: all, in
        their order. One that is no view lies beneath itself.
        """
        ...

    def order(self, *, seed: int, read_streams: int, shuffle_window: int) -> SampleOrder:
        """The order in which training reads it; raises DataError where there is no sample."""
        ...

    def check_classes(self) -> None:
        """Raises FieldError where a label means two things: names of classes do not say which are the same."""
        ...


class Part(NamedTuple):
    """One data set of a mixture.

    Attributes:
        name: what messages call it: its path.
        dataset: where its samples are.
        weight: its share of the samples is this over the sum of all weights.
    """

    name: str
    dataset: Dataset
    weight: float


class Single:
    """What all data sets but mixtures have alike."""

    shard_sizes: NDArray[np.int64]
    parts: tuple[Part, ...] = ()
    num_soft_classes: int | None = None

    def beneath(self) -> tuple[Any, Integers | None]:
        return self, None

    def order(self, *, seed: int, read_streams: int, shuffle_window: int) -> SampleOrder:
        return Order(self.shard_sizes, seed=seed, read_streams=read_streams, shuffle_window=shuffle_window)

    def check_classes(self) -> None:
        """One data set has one list of classes."""


def singles(dataset: Dataset) -> list[Dataset]:
    """The parts of a mixture, or the data set itself."""
    return [part.dataset for part in dataset.parts] or [dataset]
