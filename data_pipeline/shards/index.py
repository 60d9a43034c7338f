"""The index beside each shard: where every member of every sample lies, and its checksum."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from data_pipeline.durable import durable_file, from_json
from data_pipeline.errors import ManifestError
from data_pipeline.messages import storage_or

FORMAT = "pretrain shard index 1"
SUFFIX = ".idx"
_MAX_HEADER = 1 << 24  # bytes; one names the columns and the fields
_MAX_SHARD = 1 << 62  # bytes; more is no number of a file system
NO_LABEL = -1
MISSING = -1  # the offset of a member that a sample lacks
IMAGE_FIELDS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "ppm", "pgm", "tif", "tiff", "avif", "jfif", "jpe")
"""Extensions of images, in order of preference."""
LABEL_FIELD = "cls"
CAPTION_FIELD = "txt"


class Keys(Sequence[str]):
    """Strings as one block of UTF-8, so that the keys of many shards stay small in memory."""

    def __init__(self, text: npt.NDArray[np.uint8], ends: npt.NDArray[np.int64]) -> None:
        self.text, self.ends = text, ends

    @classmethod
    def of(cls, keys: Iterable[str]) -> Keys:
        encoded = [key.encode() for key in keys]
        text = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        return cls(text, np.cumsum([len(key) for key in encoded], dtype=np.int64))

    @overload
    def __getitem__(self, i: int) -> str: ...
    @overload
    def __getitem__(self, i: slice) -> list[str]: ...
    def __getitem__(self, i: int | slice) -> str | list[str]:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        j = range(len(self))[i]
        return self.text[self.ends[j - 1] if j else 0 : self.ends[j]].tobytes().decode()

    def __len__(self) -> int:
        return len(self.ends)


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """What lies where in one shard of S samples with F different fields.

    Attributes:
        keys: of the samples, in the order of the tar, [S].
        fields: the members' extensions, sorted, e.g. ("cls", "jpg"), [F].
        offsets: of each member's first byte in the tar, [S, F]; -1 where a sample lacks the member.
        sizes: bytes of each member, [S, F]; 0 where a sample lacks it.
        crc32: of each member's bytes, [S, F].
        labels: the integer in `cls`, [S]; -1 where there is none.
        shard_sha256: of the tar this is the index of.
        shard_bytes: size of that tar.
    """

    keys: Keys
    fields: tuple[str, ...]
    offsets: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    crc32: npt.NDArray[np.uint32]
    labels: npt.NDArray[np.int64]
    shard_sha256: str
    shard_bytes: int

    def __len__(self) -> int:
        return len(self.labels)

    def save(self, path: Path) -> None:
        """Write atomically, as safetensors; equal indexes give equal bytes."""
        header = {
            "format": FORMAT,
            "fields": self.fields,
            "shard_sha256": self.shard_sha256,
            "shard_bytes": self.shard_bytes,
        }
        tensors = {
            "keys": self.keys.text,
            "key_ends": self.keys.ends,
            "offsets": self.offsets,
            "sizes": self.sizes,
            "crc32": self.crc32,
            "labels": self.labels,
        }
        with durable_file(path) as file:
            # One metadata entry, because safetensors writes several in no particular order.
            file.write(save(tensors, metadata={"index": json.dumps(header)}))

    @classmethod
    def load(cls, path: Path) -> ShardIndex:
        """Read and check; raises ManifestError where the file is missing, damaged, or not an index."""
        try:
            content = path.read_bytes()
        except OSError as error:
            found = "no such file" if isinstance(error, FileNotFoundError) else error.strerror or str(error)
            raise _no_index(str(path), found, error) from error
        return cls.parse(content, str(path))

    @classmethod
    def parse(cls, content: bytes, where: str) -> ShardIndex:
        """The index in the bytes of a file; raises ManifestError, about `where`, if they are not one."""
        try:
            tensors = load(content)  # checks the header, which follows its length
            header = from_json(_metadata(content)["index"])
            if header["format"] != FORMAT:
                raise ValueError(f"format {header['format']!r}")
            index = cls(
                keys=Keys(tensors["keys"], tensors["key_ends"]),
                fields=tuple(header["fields"]),
                offsets=tensors["offsets"],
                sizes=tensors["sizes"],
                crc32=tensors["crc32"],
                labels=tensors["labels"],
                shard_sha256=header["shard_sha256"],
                shard_bytes=header["shard_bytes"],
            )
            index.check()
        except (SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
            raise _no_index(where, f"{error!r}", error) from error
        return index

    def check(self) -> None:
        """Raises ValueError where shapes, types or ranges cannot be those of an index."""
        table = (len(self.labels), len(self.fields))
        for name, array, dtype, shape in (
            ("keys", self.keys.text, np.uint8, self.keys.text.shape[:1]),
            ("key_ends", self.keys.ends, np.int64, table[:1]),
            ("labels", self.labels, np.int64, table[:1]),
            ("offsets", self.offsets, np.int64, table),
            ("sizes", self.sizes, np.int64, table),
            ("crc32", self.crc32, np.uint32, table),
        ):
            if array.dtype != dtype or array.shape != shape:
                raise ValueError(f"{name} is {array.dtype} {array.shape}, not {np.dtype(dtype)} {shape}")
        ends = self.keys.ends
        if (np.diff(ends, prepend=0) < 0).any() or (ends[-1] if len(ends) else 0) != len(self.keys.text):
            raise ValueError("key_ends do not divide keys")
        self.keys.text.tobytes().decode()
        if not all(isinstance(field, str) for field in self.fields):
            raise ValueError("fields are not strings")
        if not (isinstance(self.shard_bytes, int) and isinstance(self.shard_sha256, str)):
            raise ValueError("the shard's size or hash has another type")
        if not 0 <= self.shard_bytes < _MAX_SHARD:
            raise ValueError(f"a shard of {self.shard_bytes} bytes")
        present = self.offsets != MISSING
        last_start = self.shard_bytes - self.sizes  # both below 2**63, so this cannot overflow
        if (self.sizes < 0).any() or (present & ((self.offsets < 0) | (self.offsets > last_start))).any():
            raise ValueError("members lie outside the shard")


def is_index(path: Path) -> bool:
    """Whether a file is an index of ours, of whatever version; it is judged by its header."""
    try:
        with path.open("rb") as file:
            start = file.read(8)
            size = int.from_bytes(start, "little")
            if len(start) < 8 or size > _MAX_HEADER:
                return False
            header = from_json(from_json(file.read(size))["__metadata__"]["index"])
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return isinstance(header, dict) and str(header.get("format")).startswith("pretrain shard index ")


def _no_index(where: str, found: str, error: Exception) -> ManifestError:
    return ManifestError(
        where=where,
        expected="the index of a shard",
        found=found,
        fix=storage_or("Make it again with `pretrain data index`, or copy it again with its shard.", error),
    )


def _metadata(content: bytes) -> dict[str, str]:
    """What safetensors calls so: strings in the header, which its reader of bytes does not give."""
    header = from_json(content[8 : 8 + int.from_bytes(content[:8], "little")])
    metadata: dict[str, str] = header["__metadata__"]
    return metadata
