"""Soft labels beside shards that stay as they are: a teacher's probabilities, a file for each shard.

A folder of them grows in this order: `plan.json` (of which data, by which teacher), each file, at last `labels.json`,
with the hash of every file: where it stands, the labels are whole. Row i of a file is the label of sample i of its
shard, and carries the crc32 of that sample's key, which is compared whenever the row is read.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError
from safetensors.numpy import save

from data_pipeline.datasets.read import ShardDataset
from data_pipeline.durable import durable_file, from_json
from data_pipeline.errors import FieldError, ManifestError, SampleError, ShardError
from data_pipeline.local_paths import refuse_url
from data_pipeline.shards.manifest import PLAN_NAME

FILE_NAME = "labels.json"

_OPEN_FILES = 128  # per process; a step reads one shard per stream, mostly
# What reading such a file raises where its bytes are others: `map_safetensors`, and who looks into what it gives.
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError)
_TYPES = {"F16": np.float16, "I32": np.int32, "I64": np.int64, "U32": np.uint32}

Sha256 = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]
Rows = NDArray[np.float32]


class Described(BaseModel):
    """`labels.json`: by column, so that many shards stay small.

    Attributes:
        data_fingerprint: of the data set that was labeled.
        num_classes: K.
        top_k: the k largest probabilities of each row are kept; None: all K.
        classes: names of the K classes, where the teacher's run knew them.
        teacher: what made them; `weights_sha256` and more.
        num_samples: of each shard, [S].
        sha256: of each file, [S].
        left_out: samples that the teacher could not look at, each with its file and the reason.
    """

    model_config = ConfigDict(extra="forbid", strict=True)
    format: Literal["pretrain soft labels 1"] = "pretrain soft labels 1"
    data_fingerprint: Sha256
    num_classes: int = Field(ge=2)
    top_k: int | None = Field(ge=1)
    classes: list[str] | None = None
    teacher: dict[str, Any]
    num_samples: list[Annotated[int, Field(ge=0, lt=2**62)]]
    sha256: list[Sha256]
    left_out: list[str] = Field(default_factory=list)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 in hex over the labels and what they are labels of, whoever made them."""
        parts = [self.data_fingerprint, self.num_classes, self.top_k, self.sha256]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def file_name(shard: int) -> str:
    return f"labels-{shard:06d}.safetensors"


def crc32_of(keys: Any) -> NDArray[np.uint32]:
    """Returns the CRC-32 of each key in UTF-8, [n]."""
    return np.fromiter((zlib.crc32(key.encode()) for key in keys), np.uint32)


@dataclass(frozen=True, eq=False)
class ShardLabels:
    """The labels of one shard of S samples, out of a file that is mapped into memory.

    Attributes:
        values: probabilities, [S, K] in the order of the classes, or the k largest in falling order, [S, k]; float16.
        classes: of the k largest, [S, k] int32; None: all K are there.
        key_crc32: of each sample's key, [S].
    """

    values: NDArray[np.float16]
    classes: NDArray[np.int32] | None
    key_crc32: NDArray[np.uint32]

    def sha256(self) -> str:
        """Over the labels alone, whatever file they lie in."""
        digest = hashlib.sha256()
        for column in (self.values, self.classes, self.key_crc32):
            digest.update(b"" if column is None else np.ascontiguousarray(column).tobytes())
        return digest.hexdigest()

    def to_bytes(self, header: dict[str, Any]) -> bytes:
        """As safetensors with this header in its metadata; equal labels give equal bytes."""
        tensors: dict[str, NDArray[Any]] = {"values": self.values, "key_crc32": self.key_crc32}
        if self.classes is not None:
            tensors["classes"] = self.classes
        # One metadata entry, because safetensors writes several in no particular order.
        content: bytes = save(tensors, metadata={"labels": json.dumps(header)})
        return content

    def rows(self, start: int, stop: int, num_classes: int) -> Rows:
        """Labels of samples start..stop-1, each of sum 1, [stop - start, K] fp32.

        Of the k largest, the rest of the probability is spread evenly over the other classes, so that what is kept
        stays what the teacher said (Shen & Xing 2021, arXiv:2112.01528, "marginal smoothing").
        """
        values = self.values[start:stop].astype(np.float32)
        if self.classes is not None:
            rest = np.maximum(0, 1 - values.sum(1, keepdims=True)) / max(1, num_classes - values.shape[1])
            full = np.repeat(rest, num_classes, axis=1)
            np.put_along_axis(full, self.classes[start:stop].astype(np.int64), values, axis=1)
            values = full
        normed: Rows = values / values.sum(1, keepdims=True)
        return normed


class SoftLabels:
    """A folder that `pretrain data label` wrote. Every file is compared with its hash when it is opened.

    Raises:
        ManifestError: no such folder, an unfinished or a damaged one, or a file is missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.described = folder, _described(folder)
        self.num_classes = self.described.num_classes
        self.classes = None if self.described.classes is None else tuple(self.described.classes)
        self.ends = np.cumsum(self.described.num_samples, dtype=np.int64)
        self.num_samples = int(self.ends[-1]) if len(self.ends) else 0
        self._open: OrderedDict[int, ShardLabels] = OrderedDict()  # the one used last at the end
        for shard in range(len(self.ends)):
            if not (folder / file_name(shard)).is_file():
                raise ManifestError(
                    where=str(folder / file_name(shard)),
                    expected="the labels of a shard",
                    found="no such file",
                    fix=f"Copy it again, or remove {FILE_NAME} and give the command that made the labels again.",
                )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}  # another process maps its own files

    def refuse_other_data(self, dataset: ShardDataset, where: str) -> None:
        """Raises FieldError, about `where`, unless these are labels of just this data set."""
        sizes = dataset.shard_sizes.tolist()
        if self.described.data_fingerprint != dataset.fingerprint or self.described.num_samples != sizes:
            raise FieldError(
                where=where,
                expected=f"labels of {dataset.manifest.root} ({dataset.num_samples} samples in {len(sizes)} shards, "
                f"fingerprint {dataset.fingerprint[:12]}...)",
                found=f"{self.folder}: labels of {self.num_samples} samples in {len(self.ends)} shards, fingerprint "
                f"{self.described.data_fingerprint[:12]}...",
                fix="Label these shards: pretrain data label SHARDS OUT --teacher RUN.",
            )

    def row(self, i: int, key: str) -> Rows:
        """The label of sample i, [K] fp32 of sum 1.

        Raises:
            SampleError: it is that of a sample with another key.
            ShardError: its file cannot be read, or holds other bytes than were written.
        """
        number = int(self.ends.searchsorted(i, side="right"))
        shard, row = self.shard(number), i - int(self.ends[number] - self.described.num_samples[number])
        if shard.key_crc32[row] != zlib.crc32(key.encode()):
            raise SampleError(
                where=f"{self.folder / file_name(number)}, row {row}",
                expected=f"the label of {key}",
                found="that of another key",
            )
        label: Rows = shard.rows(row, row + 1, self.num_classes)[0]
        return label

    def shard(self, number: int) -> ShardLabels:
        opened = self._open.get(number)
        if opened is None:
            while len(self._open) >= _OPEN_FILES:
                self._open.popitem(last=False)
            opened = self._open[number] = self._checked(number)
        self._open.move_to_end(number)
        return opened

    def _checked(self, number: int) -> ShardLabels:
        path, size = self.folder / file_name(number), self.described.num_samples[number]
        try:
            labels, _, digest = read_file(path)
        except UNREADABLE as error:
            raise ShardError(where=str(path), expected="the labels of a shard", found=repr(error)) from error
        if digest != self.described.sha256[number] or len(labels.values) != size:
            raise ShardError(
                where=str(path),
                expected=f"the labels of {size} samples, sha256 {self.described.sha256[number][:12]}...",
                found=f"those of {len(labels.values)}, sha256 {digest[:12]}...",
                fix="Copy the folder of labels again, or make it again.",
            )
        return labels


def read_file(path: Path) -> tuple[ShardLabels, dict[str, Any], str]:
    """The labels in a file, mapped into memory, its header, and the SHA-256 of its bytes in hex.

    Raises:
        UNREADABLE: it cannot be read, or is none.
    """
    tensors, metadata, digest = map_safetensors(path)
    header = from_json(metadata["labels"])
    if not isinstance(header, dict):
        raise ValueError("no description of the labels")
    labels = ShardLabels(tensors["values"], tensors.get("classes"), tensors["key_crc32"])
    shape = labels.values.shape
    if len(shape) != 2 or labels.key_crc32.shape != shape[:1] or labels.values.dtype != np.float16:
        raise ValueError(f"values {labels.values.dtype} {shape}, key_crc32 {labels.key_crc32.shape}")
    if labels.classes is not None and labels.classes.shape != shape:
        raise ValueError(f"classes {labels.classes.shape} for values {shape}")
    return labels, header, digest


def map_safetensors(path: Path) -> tuple[dict[str, NDArray[Any]], dict[str, str], str]:
    """Tensors and metadata of a safetensors file, mapped into memory, and the SHA-256 of its bytes in hex."""
    with path.open("rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    digest = hashlib.sha256(content).hexdigest()
    begin = 8 + int.from_bytes(content[:8], "little")
    header = from_json(content[8:begin])
    metadata = header.pop("__metadata__", {})
    tensors = {}
    for name, entry in header.items():
        count = math.prod(entry["shape"])
        flat = np.frombuffer(content, _TYPES[entry["dtype"]], count, begin + entry["data_offsets"][0])
        tensors[name] = flat.reshape(entry["shape"])
    return tensors, metadata, digest


def write_labels_file(folder: Path, described: Described) -> None:
    """`labels.json`, atomically; written last, it makes the folder whole."""
    with durable_file(folder / FILE_NAME) as file:
        file.write(described.model_dump_json(indent=1).encode() + b"\n")


def _described(folder: Path) -> Described:
    path = folder / FILE_NAME
    try:
        found = Described.model_validate_json(path.read_bytes())
        if len(found.num_samples) != len(found.sha256) or (found.top_k or 1) > found.num_classes:
            raise ValueError("its columns differ in length, or top_k exceeds num_classes")
        if found.classes is not None and len(found.classes) != found.num_classes:
            raise ValueError(f"{len(found.classes)} names of {found.num_classes} classes")
    except FileNotFoundError:
        unfinished = (folder / PLAN_NAME).is_file()
        raise ManifestError(
            where=str(folder),
            expected=f"soft labels: a folder with {FILE_NAME}",
            found="unfinished ones" if unfinished else "none",
            fix="Give the command that makes them again; it goes on where it stopped."
            if unfinished
            else "Make them: pretrain data label SHARDS OUT --teacher RUN.",
        ) from None
    except (OSError, ValidationError, ValueError) as error:
        found_text = str(error).splitlines()[0][:200]
        raise ManifestError(where=str(path), expected="the description of soft labels", found=found_text) from error
    return found


def open_labels(path: str) -> SoftLabels:
    """The soft labels in a folder of this machine.

    Raises:
        InputError: a URL, or as `SoftLabels` says.
    """
    refuse_url("the folder of soft labels", path)
    return SoftLabels(Path(path))
