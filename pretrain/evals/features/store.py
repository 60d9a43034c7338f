"""Features on disk: computed once by any number of ranks, read by every protocol, continued where a stop left them."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data_pipeline.batch import LeftOut
from data_pipeline.durable import from_json, naming, write_text
from data_pipeline.errors import InputError, RunError

FORMAT = 2  # raised where other features would come out of the same question: by another readout, other views
CHUNK = 1024  # samples that are computed, or lost by a stop, together; a store's, whatever the batch


@dataclass(frozen=True)
class Features:
    """N samples: values [N, D] fp32, labels [N] int64 (all -1 where none were asked for), and their keys.

    Attributes:
        left_out: samples of the data set that cannot be used, by their numbers; `extract` takes them out of the others.
        numbers: of each sample in the data set, [N] int64; None: 0 to N - 1.
    """

    values: Tensor
    labels: Tensor
    keys: tuple[str, ...]
    left_out: tuple[LeftOut, ...] = ()
    numbers: Tensor | None = None

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device) -> Features:
        return replace(self, values=self.values.to(device), labels=self.labels.to(device))

    def kept(self) -> Features:
        """Without those that are left out."""
        if not self.left_out:
            return self
        mask = torch.ones(len(self), dtype=torch.bool)
        mask[[one.row for one in self.left_out]] = False
        numbers = mask.nonzero().flatten()
        keys = tuple(self.keys[i] for i in numbers.tolist())
        return Features(self.values[numbers], self.labels[numbers], keys, self.left_out, numbers)


def joined(parts: Sequence[Features]) -> Features:
    return Features(
        torch.cat([part.values for part in parts]),
        torch.cat([part.labels for part in parts]),
        tuple(key for part in parts for key in part.keys),
        tuple(one for part in parts for one in part.left_out),
    )


class FeatureStore:
    """A folder of features; each question has a folder of its own in it, named by the hash of the question.

    Args:
        folder: made when something is kept; ranks on several machines share it.

    Raises:
        InputError: it is a file.
    """

    def __init__(self, folder: Path) -> None:
        if folder.exists() and not folder.is_dir():
            raise InputError(where="--cache", expected="a folder", found=f"a file, {folder}")
        self.folder = folder

    def shelf(self, question: Mapping[str, object], total: int) -> CacheEntry:
        """Where the features of `total` samples are kept that answer `question`: whatever they depend on."""
        asked = json.dumps({"format": FORMAT, **question, "n": total}, sort_keys=True, indent=2)
        return CacheEntry(self.folder / hashlib.sha256(asked.encode()).hexdigest()[:32], asked, total)


@dataclass(frozen=True)
class CacheEntry:
    """The features of one data set, [N, D] fp32 in one file that is mapped into memory, and a record per chunk of it.

    A record is written once its rows are on disk, and carries their checksum: what a stop tore, or a disk damaged, is
    computed again.
    """

    folder: Path
    question: str
    total: int

    @cached_property
    def chunks(self) -> tuple[range, ...]:
        return tuple(range(i, min(i + CHUNK, self.total)) for i in range(0, self.total, CHUNK))

    def missing(self) -> list[int]:
        """Numbers of the chunks that are still to be computed; reads all others.

        One of which samples were left out is tried again: a file may have been out of reach for a while.
        """
        width, found = None, []
        for number in range(len(self.chunks)):
            record = self._record(number)
            if (
                record is None
                or "left_out" in record
                or (width is not None and record["width"] != width)
                or not self._sound(number, record)
            ):
                found.append(number)
            else:
                width = record["width"]
        return found

    def put(self, number: int, features: Features) -> None:
        """Keeps a chunk; several processes may each keep others."""
        rows = self.chunks[number]
        values = np.ascontiguousarray(features.values.numpy(), np.float32)
        content = memoryview(values.data).cast("B")
        if values.shape[0] != len(rows):
            raise RunError(
                where=str(self.folder), expected=f"{len(rows)} rows of chunk {number}", found=f"{len(values)}"
            )
        if not (question := self.folder / "question.json").is_file():
            write_text(question, self.question)
        width = values.shape[1]
        descriptor = os.open(self._values, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            with naming(self._values):
                size = self.total * width * 4
                if os.fstat(descriptor).st_size != size:
                    os.ftruncate(descriptor, size)
                _write_at(descriptor, content, rows.start * width * 4)
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
        record = {
            "width": width,
            "crc32": zlib.crc32(content),
            "labels": features.labels.tolist(),
            "keys": list(features.keys),
        }
        if features.left_out:
            record["left_out"] = [asdict(one) for one in features.left_out]
        write_text(self._record_path(number), json.dumps(record))

    def features(self) -> Features:
        """All of them; the values are mapped, so that several processes share one copy.

        Raises:
            RunError: a chunk is not there.
        """
        records = [self._record(number) for number in range(len(self.chunks))]
        there = [record for record in records if record is not None]
        if len(there) != len(records):
            raise self._gone(f"{len(there)} of them")
        width = there[0]["width"]
        try:
            mapped = torch.from_file(str(self._values), shared=False, size=self.total * width, dtype=torch.float32)
        except RuntimeError as error:  # as torch calls what the system refuses
            raise self._gone(f"their records without {self._values.name}, or with less of it") from error
        return Features(
            mapped.view(self.total, width),
            torch.tensor([label for record in there for label in record["labels"]], dtype=torch.int64),
            tuple(key for record in there for key in record["keys"]),
            tuple(LeftOut(**one) for record in there for one in record.get("left_out", [])),
        )

    def _gone(self, found: str) -> RunError:
        return RunError(
            where=str(self.folder),
            expected=f"{len(self.chunks)} chunks of features",
            found=found,
            fix="Something else removed them: start the evaluation again. If it stays so, the folder is not shared by "
            "all ranks.",
        )

    @property
    def _values(self) -> Path:
        return self.folder / "values.f32"

    def _record_path(self, number: int) -> Path:
        return self.folder / f"chunk_{number:06d}.json"

    def _record(self, number: int) -> dict[str, Any] | None:
        try:
            record = from_json(self._record_path(number).read_text("utf-8"))
        except (OSError, ValueError):
            return None
        known = isinstance(record, dict) and record.keys() - {"left_out"} == {"width", "crc32", "labels", "keys"}
        return record if known else None

    def _sound(self, number: int, record: Mapping[str, Any]) -> bool:
        rows, width = self.chunks[number], int(record["width"])
        if not len(record["keys"]) == len(record["labels"]) == len(rows):
            return False
        try:
            with self._values.open("rb") as file:
                file.seek(rows.start * width * 4)
                content = file.read(len(rows) * width * 4)
        except OSError:
            return False
        return len(content) == len(rows) * width * 4 and zlib.crc32(content) == record["crc32"]


def architecture_sha256(module: nn.Module) -> str:
    """Over what a module's parts are and how they are set (heads, epsilons, strides): what no weights tell."""
    told = [(name, type(part).__qualname__, _settings(part)) for name, part in module.named_modules()]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def _settings(part: nn.Module) -> list[tuple[str, str]]:
    plain = (bool, int, float, str, type(None))
    return sorted(
        (name, repr(value))
        for name, value in vars(part).items()
        if name != "training" and not name.startswith("_")
        if all(isinstance(member, plain) for member in (value if isinstance(value, tuple) else (value,)))
    )


def _write_at(descriptor: int, content: memoryview, offset: int) -> None:
    while content:
        written = os.pwrite(descriptor, content, offset)
        content, offset = content[written:], offset + written
