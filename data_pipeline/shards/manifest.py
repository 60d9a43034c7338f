"""The manifest of a dataset: its shards, their counts, sizes and hashes. It is written last: where it stands,
the dataset is whole.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Annotated, BinaryIO, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from data_pipeline.durable import durable_file, from_json
from data_pipeline.errors import ManifestError, ShardError
from data_pipeline.messages import reason, storage_or
from data_pipeline.remote.fetch import Remote
from data_pipeline.shards.index import SUFFIX, ShardIndex
from data_pipeline.shards.specs import is_inside

FILE_NAME = "manifest.json"
PLAN_NAME = "plan.json"  # written first by what makes shards; without a manifest beside it they are unfinished

Count = Annotated[int, Field(ge=0, lt=2**62)]
KeyScope = Literal["unique", "by shard"]


class _File(BaseModel):
    """The JSON on disk: by column, so that a hundred thousand shards stay small."""

    model_config = ConfigDict(extra="forbid", strict=True)
    format: Literal["pretrain shards 1"] = "pretrain shards 1"
    fields: list[str]
    classes: list[str] | None
    label_counts: list[Count] | None
    names: list[str]
    num_samples: list[Count]
    num_bytes: list[Count]
    sha256: list[Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]]
    keys: KeyScope | None = None


@dataclass(frozen=True)
class ShardSummary:
    """What a manifest says of one shard; `label_counts` is [K] for labels 0..K-1 as far as they occur."""

    num_samples: int
    num_bytes: int
    sha256: str
    fields: tuple[str, ...]
    label_counts: npt.NDArray[np.int64]

    @classmethod
    def of(cls, index: ShardIndex) -> ShardSummary:
        counts = np.bincount(index.labels[index.labels >= 0]).astype(np.int64)
        return cls(len(index), index.shard_bytes, index.shard_sha256, index.fields, counts)


@dataclass(frozen=True, eq=False)
class Manifest:
    """S shards that make up one dataset.

    Attributes:
        root: the folder that `names` are relative to, here or behind a URL.
        names: the shards' files, [S].
        num_samples: per shard, [S].
        num_bytes: size of each tar, [S].
        sha256: of each tar, in hex, [S].
        fields: every extension that occurs, sorted, e.g. ("cls", "jpg", "txt").
        classes: their names, by label; None: not known.
        label_counts: histogram of the labels, [K]; None: no sample has one.
        keys: whether the keys in the tars are unique over all of them, or repeat, so that a sample's key is
            SHARD.tar/KEY; None: an older manifest, which does not say, and whose keys are taken as they are.
    """

    root: Path | Remote
    names: tuple[str, ...]
    num_samples: npt.NDArray[np.int64]
    num_bytes: npt.NDArray[np.int64]
    sha256: tuple[str, ...]
    fields: tuple[str, ...]
    classes: tuple[str, ...] | None
    label_counts: npt.NDArray[np.int64] | None
    keys: KeyScope | None = None

    @classmethod
    def of(
        cls,
        root: Path | Remote,
        names: Sequence[str],
        shards: Iterable[ShardSummary],
        classes: Sequence[str] | None,
        keys: KeyScope | None,
    ) -> Manifest:
        """The manifest of `shards`, one per name; raises ManifestError where a label has no class name."""
        shards = tuple(shards)
        counts = _sum_counts([shard.label_counts for shard in shards])
        if classes is not None and len(counts) > len(classes):
            raise ManifestError(
                where=str(root),
                expected=f"labels below {len(classes)}, the number of class names",
                found=f"label {len(counts) - 1}",
                fix="Give a class name for every label.",
            )
        if classes is not None and len(counts):
            counts = np.pad(counts, (0, len(classes) - len(counts)))
        return cls(
            root=root,
            names=tuple(names),
            num_samples=np.array([shard.num_samples for shard in shards], dtype=np.int64),
            num_bytes=np.array([shard.num_bytes for shard in shards], dtype=np.int64),
            sha256=tuple(shard.sha256 for shard in shards),
            fields=tuple(sorted({field for shard in shards for field in shard.fields})),
            classes=None if classes is None else tuple(classes),
            label_counts=counts if len(counts) else None,
            keys=keys,
        )

    @property
    def total(self) -> int:
        """Samples in all shards together."""
        return int(self.num_samples.sum())

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 in hex over names, counts and hashes of the shards: the identity of the data. What is drawn for a
        sample goes by its key, so that data whose keys go by shard are others.
        """
        digest = hashlib.sha256(b"keys by shard" if self.keys == "by shard" else b"")
        for piece in _as_json([self.names, self.num_samples.tolist(), self.sha256]):
            digest.update(piece.encode())
        return digest.hexdigest()

    def sample_key(self, i: int, key: str) -> str:
        """The key of a sample in this data set, given that in its tar, shard i."""
        return f"{self.names[i]}/{key}" if self.keys == "by shard" else key

    def path(self, i: int) -> Path:
        """Returns the path of shard i, where the shards are files of this machine."""
        assert isinstance(self.root, Path), f"{self.root} is no folder of this machine"
        return self.root / self.names[i]

    def index_path(self, i: int) -> Path:
        return self.path(i).with_suffix(SUFFIX)

    def where(self, i: int) -> str:
        """Path or URL of shard i, for messages."""
        return self.root.join(self.names[i]) if isinstance(self.root, Remote) else str(self.path(i))

    def open(self, i: int) -> BinaryIO:
        """Shard i, opened for reading; what lies behind a URL is fetched first, unless the cache has it.

        Raises:
            ShardError: it cannot be read, or a fetched one is not as the manifest says.
            RunError: it could not be fetched.
        """
        if isinstance(self.root, Remote):
            return self.root.open_shard(self.names[i], int(self.num_bytes[i]), self.sha256[i])
        try:
            return self.path(i).open("rb", buffering=0)
        except OSError as error:
            raise ShardError(
                where=self.where(i), expected="a readable shard", found=error.strerror or str(error)
            ) from error

    def index(self, i: int) -> ShardIndex:
        """The index of shard i; raises ManifestError where it is damaged or of another tar, RunError as `open`."""
        if isinstance(self.root, Path):
            return self._own(ShardIndex.load(self.index_path(i)), str(self.index_path(i)), i)
        name = str(PurePosixPath(self.names[i]).with_suffix(SUFFIX))
        where = self.root.join(name)

        def parse(content: bytes) -> ShardIndex:
            return self._own(ShardIndex.parse(content, where), where, i)

        return self.root.load_index(name, self.sha256[i], int(self.num_bytes[i]), parse)

    def _own(self, index: ShardIndex, where: str, i: int) -> ShardIndex:
        """`index` if it is that of shard i."""
        if index.shard_sha256 != self.sha256[i] or len(index) != self.num_samples[i]:
            raise ManifestError(
                where=where,
                expected=f"the index of {self.num_samples[i]} samples, sha256 {self.sha256[i][:12]}...",
                found=f"that of {len(index)} samples, sha256 {index.shard_sha256[:12]}...",
                fix="Copy the shard, its index and the manifest again, all three from one place.",
            )
        return index

    def save(self) -> None:
        """Write `manifest.json` into the root, a folder of this machine, atomically."""
        assert isinstance(self.root, Path)
        file = _File(
            fields=list(self.fields),
            classes=None if self.classes is None else list(self.classes),
            label_counts=None if self.label_counts is None else self.label_counts.tolist(),
            names=list(self.names),
            num_samples=self.num_samples.tolist(),
            num_bytes=self.num_bytes.tolist(),
            sha256=list(self.sha256),
            keys=self.keys,
        )
        with durable_file(self.root / FILE_NAME) as out:
            out.write(file.model_dump_json(indent=1).encode() + b"\n")

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """The manifest in the file `path`; its shards are not looked at. Raises ManifestError."""
        try:
            file = _File.model_validate(from_json(path.read_text("utf-8")))  # less at its peak than pydantic
            lengths = {len(column) for column in (file.names, file.num_samples, file.num_bytes, file.sha256)}
            if len(lengths) != 1 or len(set(file.names)) != len(file.names):
                raise ValueError("the columns differ in length, or a shard is named twice")
            if bad := [name for name in file.names if not is_inside(name)]:
                raise ValueError(f"the shard {bad[0]!r} is not a .tar inside this folder")
        except (OSError, ValueError) as error:
            raise ManifestError(
                where=str(path),
                expected="the manifest of a dataset",
                found=_reason(error),
                fix=storage_or("Copy it again, or remove it and make it again with `pretrain data index`.", error),
            ) from error
        return cls(
            root=path.parent,
            names=tuple(file.names),
            num_samples=np.array(file.num_samples, dtype=np.int64),
            num_bytes=np.array(file.num_bytes, dtype=np.int64),
            sha256=tuple(file.sha256),
            fields=tuple(file.fields),
            classes=None if file.classes is None else tuple(file.classes),
            label_counts=None if file.label_counts is None else np.array(file.label_counts, dtype=np.int64),
            keys=file.keys,
        )

    def select(self, wanted: Sequence[str]) -> Manifest:
        """The same dataset with the shards `wanted` only, in the manifest's order."""
        known = {name: i for i, name in enumerate(self.names)}
        if unknown := [name for name in wanted if name not in known]:
            raise ManifestError(
                where=f"{self.root}/{FILE_NAME}",
                expected="every shard of the pattern in the manifest",
                found=f"no {unknown[0]} among its {len(self.names)} shards",
                fix="Correct the pattern, or index the shards again.",
            )
        chosen = sorted({known[name] for name in wanted})
        if len(chosen) == len(self.names):
            return self
        part = replace(
            self,
            names=tuple(self.names[i] for i in chosen),
            num_samples=self.num_samples[chosen],
            num_bytes=self.num_bytes[chosen],
            sha256=tuple(self.sha256[i] for i in chosen),
        )
        summaries = (ShardSummary.of(part.index(i)) for i in range(len(chosen)))
        return Manifest.of(self.root, part.names, summaries, self.classes, self.keys)


def _as_json(columns: Sequence[Sequence[str] | Sequence[int]], at_once: int = 4096) -> Iterator[str]:
    """What `json.dumps(columns)` gives, in pieces: of many shards it would be tens of megabytes."""
    for number, column in enumerate(columns):
        yield ", [" if number else "[["
        for start in range(0, len(column), at_once):
            yield (", " if start else "") + json.dumps(column[start : start + at_once])[1:-1]
        yield "]"
    yield "]"


def _sum_counts(counts: Sequence[npt.NDArray[np.int64]]) -> npt.NDArray[np.int64]:
    total = np.zeros(max((len(count) for count in counts), default=0), dtype=np.int64)
    for count in counts:
        total[: len(count)] += count
    return total


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(str(part) for part in first['loc']) or 'the file'}: {first['msg']}"
    return reason(error)[:200]
