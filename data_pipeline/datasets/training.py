"""The data set that a run trains on, as its recipe names it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from data_pipeline.datasets.config import Source
from data_pipeline.datasets.dataset import Dataset, Part
from data_pipeline.datasets.mixture import Mixture
from data_pipeline.datasets.read import open_dataset
from data_pipeline.datasets.selection import Selected
from data_pipeline.datasets.soft_labeled import SoftLabeled
from data_pipeline.datasets.soft_labels import open_labels
from data_pipeline.remote.config import DEFAULT, CacheConfig


def open_training(train: str | Sequence[Source], cache: CacheConfig = DEFAULT, *, by_number: bool = False) -> Dataset:
    """The data set at a path, as `open_dataset` takes it, or a mixture of several, which `by_number` is passed on to.

    One source alone is itself.

    Raises:
        DataError: as `open_dataset` and `Mixture` say; soft labels or a selection are not of the data beside them.
    """
    if isinstance(train, str):
        return open_dataset(train, cache)
    if len(train) == 1:
        return _open_source(train[0], 0, cache)
    opened = [_open_source(source, number, cache) for number, source in enumerate(train)]
    parts = [Part(source.path, data, source.weight) for source, data in zip(train, opened, strict=True)]
    return Mixture(parts, by_number=by_number)


def _open_source(source: Source, number: int, cache: CacheConfig) -> Dataset:
    """A data set with its soft labels, and of it what was selected."""
    dataset, where = open_dataset(source.path, cache), f"data.train.{number}"
    if source.labels is not None:
        dataset = SoftLabeled(dataset, open_labels(source.labels), f"{where}.labels")
    return dataset if source.select is None else Selected(dataset, Path(source.select), f"{where}.select")
