"""A data set together with the soft labels that lie beside it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from data_pipeline.batch import Sample
from data_pipeline.datasets.dataset import Dataset, Single
from data_pipeline.datasets.read import ShardDataset
from data_pipeline.datasets.soft_labels import SoftLabels
from data_pipeline.errors import FieldError
from data_pipeline.order.order import Integers


class SoftLabeled(Single):
    """A data set whose samples have soft labels from beside it, whatever labels lie in its shards.

    Raises:
        FieldError: the labels are not those of this data set, or it is none of shards.
    """

    def __init__(self, base: Dataset, labels: SoftLabels, where: str = "labels") -> None:
        if not isinstance(base, ShardDataset):
            raise FieldError(where=where, expected="shards beside them", found="an image folder")
        labels.refuse_other_data(base, where)
        self.base, self.labels, self.num_soft_classes = base, labels, labels.num_classes
        self.num_samples, self.shard_sizes, self.fields = base.num_samples, base.shard_sizes, base.fields
        self.classes: tuple[str, ...] | None = labels.classes
        self.label_counts: NDArray[np.int64] | None = None
        parts = [base.fingerprint, labels.described.fingerprint]
        self.fingerprint = self.state = hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def beneath(self) -> tuple[Dataset, Integers | None]:
        return self.base.beneath()

    def read(self, i: int) -> Sample:
        sample = self.base.read(i)
        return replace(sample, label=self.labels.row(i, sample.key))

    def origin(self, i: int) -> tuple[str, str]:
        return self.base.origin(i)
