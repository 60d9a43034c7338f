"""Some samples of a data set, in one small file: which, how often, and with what labels. No image is copied.

What is chosen is a list of (index of a sample, number of its repeat, label). It is sorted by index, so that its
samples are read in the order in which they lie, and it is a data set like any other: N is the length of the list.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from data_pipeline.batch import Sample
from data_pipeline.datasets.dataset import Dataset, Single
from data_pipeline.datasets.read import ShardDataset
from data_pipeline.datasets.soft_labeled import SoftLabeled
from data_pipeline.datasets.soft_labels import UNREADABLE, map_safetensors
from data_pipeline.durable import durable_file, from_json
from data_pipeline.errors import FieldError, ManifestError
from data_pipeline.messages import storage_or
from data_pipeline.order.order import Integers

FORMAT = "pretrain selection 1"


@dataclass(frozen=True, eq=False)
class Selection:
    """N entries of a list.

    Attributes:
        indices: of the samples in their data set, not falling, [N] int64.
        repeats: how often the same sample was listed before, [N] int32.
        labels: of the entries, [N] int32; None: the soft labels of the sample.
        num_classes: K.
        data_fingerprint: of the data set that was chosen from.
        labels_fingerprint: of the soft labels that it was chosen by; None: by true labels.
        rule: how, for people and for reports.
        classes: names of the teacher's classes, where it was chosen by soft labels that have them.
    """

    indices: Integers
    repeats: NDArray[np.int32]
    labels: NDArray[np.int32] | None
    num_classes: int
    data_fingerprint: str
    labels_fingerprint: str | None
    rule: Mapping[str, Any]
    classes: Sequence[str] | None = None

    @classmethod
    def of(cls, indices: Integers, labels: Integers, *, keep_labels: bool, **described: Any) -> Selection:
        """From entries in any order; labels [N] are those chosen for, forgotten where a sample's soft ones are kept."""
        order = np.lexsort((labels, indices))
        indices, labels = indices[order], labels[order]
        first = np.flatnonzero(np.diff(indices, prepend=-1))  # of each run of equal indices
        runs = np.diff(np.append(first, len(indices)))
        repeats = (np.arange(len(indices)) - np.repeat(first, runs)).astype(np.int32)
        return cls(indices, repeats, labels.astype(np.int32) if keep_labels else None, **described)

    def __len__(self) -> int:
        return len(self.indices)

    def save(self, path: Path) -> None:
        """Writes the file whole or not at all; equal selections give equal bytes."""
        tensors: dict[str, NDArray[Any]] = {"indices": self.indices, "repeats": self.repeats}
        if self.labels is not None:
            tensors["labels"] = self.labels
        header = {
            "format": FORMAT,
            "num_classes": self.num_classes,
            "data_fingerprint": self.data_fingerprint,
            "labels_fingerprint": self.labels_fingerprint,
            "rule": dict(self.rule),
            **({} if self.classes is None else {"classes": list(self.classes)}),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        with durable_file(path) as file:
            file.write(save(tensors, metadata={"selection": json.dumps(header)}))

    @classmethod
    def load(cls, path: Path) -> tuple[Selection, str]:
        """The selection in a file, mapped into memory, and the SHA-256 of its bytes; raises ManifestError."""
        try:
            tensors, metadata, digest = map_safetensors(path)
            header = from_json(metadata["selection"])
            if header.pop("format") != FORMAT:
                raise ValueError("another format")
            found = cls(tensors["indices"], tensors["repeats"], tensors.get("labels"), **header)
            found._check()
        except UNREADABLE as error:
            reason = error.strerror or "" if isinstance(error, OSError) else repr(error)
            raise ManifestError(
                where=str(path),
                expected="a selection",
                found=reason,
                fix=storage_or("Make it: pretrain data select SOURCE OUT.", error),
            ) from error
        return found, digest

    def _check(self) -> None:
        columns: list[NDArray[Any]] = [self.indices, self.repeats, *([] if self.labels is None else [self.labels])]
        if not len(self) or any(column.shape != (len(self),) for column in columns):
            raise ValueError("no entry, or columns that differ in length")
        if self.indices.dtype != np.int64 or self.indices[0] < 0 or (np.diff(self.indices) < 0).any():
            raise ValueError("indices that fall")
        if self.labels is not None and not 0 <= self.labels.min() <= self.labels.max() < self.num_classes:
            raise ValueError(f"labels outside [0, {self.num_classes})")
        if self.classes is not None and len(self.classes) != self.num_classes:
            raise ValueError(f"{len(self.classes)} names of {self.num_classes} classes")


class Subset(Single):
    """Some samples of a data set, as a data set.

    Args:
        base: the whole.
        indices: of the samples in it, not falling, [N] int64.
        label_counts: how many of them have each label, [K] int64; None: they have soft ones.
        digest: of what the list is kept in; None: of the list.
    """

    def __init__(
        self, base: Dataset, indices: Integers, label_counts: Integers | None, *, digest: str | None = None
    ) -> None:
        self.base, self.indices, self.label_counts = base, indices, label_counts
        self.num_samples, self.fields, self.classes = len(indices), base.fields, base.classes
        self.shard_sizes = np.diff(np.searchsorted(indices, np.cumsum(base.shard_sizes)), prepend=0)
        digest = digest or hashlib.sha256(indices.tobytes()).hexdigest()
        self.fingerprint, self.state = (
            hashlib.sha256(json.dumps([of_base, digest]).encode()).hexdigest()
            for of_base in (base.fingerprint, base.state)
        )

    def beneath(self) -> tuple[Dataset, Integers | None]:
        base, indices = self.base.beneath()
        return base, self.indices if indices is None else indices[self.indices]

    def read(self, i: int) -> Sample:
        return self.base.read(int(self.indices[i]))

    def origin(self, i: int) -> tuple[str, str]:
        return self.base.origin(int(self.indices[i]))


class Selected(Subset):
    """The samples of a selection, as a data set. A sample that is listed again has the key `KEY#2`, `KEY#3`, ..., so
    that what is drawn for it is drawn anew.

    Args:
        base: the data set that was chosen from; with its soft labels, where the selection has no labels.
        path: of the selection's file.
        where: what messages call it.

    Raises:
        ManifestError: no selection there.
        FieldError: it is one of other data or labels, or lacks labels.
    """

    def __init__(self, base: Dataset, path: Path, where: str = "select") -> None:
        selection, digest = Selection.load(path)
        _refuse_other(selection, base, path, where)
        counts = None
        if selection.labels is not None:
            counts = np.bincount(selection.labels, minlength=selection.num_classes).astype(np.int64)
        super().__init__(base, selection.indices, counts, digest=digest)
        self.selection = selection
        self.num_soft_classes = selection.num_classes if selection.labels is None else None
        if selection.labels_fingerprint is not None and selection.labels is not None:
            self.classes = None if selection.classes is None else tuple(selection.classes)  # the teacher's

    def read(self, i: int) -> Sample:
        sample = super().read(i)
        label = sample.label if self.selection.labels is None else int(self.selection.labels[i])
        return replace(sample, key=self._key(i, sample.key), label=label)

    def origin(self, i: int) -> tuple[str, str]:
        key, file = super().origin(i)
        return self._key(i, key), file

    def _key(self, i: int, key: str) -> str:
        repeat = int(self.selection.repeats[i])
        return f"{key}#{repeat + 1}" if repeat else key


def _refuse_other(selection: Selection, base: Dataset, path: Path, where: str) -> None:
    soft = base if isinstance(base, SoftLabeled) else None
    data = soft.base if soft is not None else base
    if selection.data_fingerprint != data.fingerprint or selection.indices[-1] >= data.num_samples:
        raise FieldError(
            where=where,
            expected=f"a selection of this data set (fingerprint {data.fingerprint[:12]}...)",
            found=f"{path}: one of other data (fingerprint {selection.data_fingerprint[:12]}...)",
            fix="Select from it anew: pretrain data select SOURCE OUT.",
        )
    given = None if soft is None else soft.labels.described.fingerprint
    wanted = selection.labels_fingerprint if selection.labels is None else None
    if given != wanted:
        own = f"no `labels` beside it, as {path} has its own"
        raise FieldError(
            where=where,
            expected=own if wanted is None else f"`labels` beside it: the folder that {path} was made from",
            found="none" if soft is None else f"labels {soft.labels.folder}",
        )


def shards_in(dataset: Dataset) -> ShardDataset:
    """`dataset` as one of shards; raises FieldError where it is an image folder, whose samples have no fixed number."""
    if not isinstance(dataset, ShardDataset):
        raise FieldError(
            where="SHARDS",
            expected="shards",
            found="an image folder",
            fix="Convert it: pretrain data convert SRC OUT.",
        )
    return dataset
