"""What is listed once and read at will: bytes or rows in a temporary file without a name.

The system frees the file when this process ends, however it ends; other processes open it by `row_path`.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from data_pipeline.shards.write import Producer


def nameless_file(folder: Path) -> BinaryIO:
    """A temporary file on the disk of `folder`."""
    return cast(BinaryIO, tempfile.TemporaryFile(dir=folder))


def row_path(file: BinaryIO) -> Path:
    """Where other processes can open a file that has no name, as long as this one lives (Linux)."""
    return Path(f"/proc/{os.getpid()}/fd/{file.fileno()}")


class RowStore:
    """Rows of JSON put aside, of which only the offsets stay in memory: 8 bytes a row.

    Attributes:
        offsets: of the rows, in the order in which they were added.
    """

    def __init__(self, folder: Path) -> None:
        self._file, self._end, self._digest = nameless_file(folder), 0, hashlib.sha256()
        self.offsets: array[int] = array("q")

    def add(self, row: dict[str, Any]) -> None:
        line = json.dumps(row, separators=(",", ":")).encode() + b"\n"
        self.offsets.append(self._end)
        self._file.write(line)
        self._digest.update(line)
        self._end += len(line)

    @property
    def identity(self) -> str:
        """SHA-256 in hex over all rows."""
        return self._digest.hexdigest()

    def reader(self) -> RowReader:
        """Returns a reader of the rows added so far; good as long as this object lives."""
        self._file.flush()
        return RowReader(row_path(self._file))


class RowReader:
    """Reads rows by their offsets; travels to worker processes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO | None = None

    def __reduce__(self) -> tuple[type[RowReader], tuple[Path]]:
        return RowReader, (self._path,)  # another process opens it for itself

    def read(self, offset: int) -> dict[str, Any]:
        self._file = self._file or self._path.open("rb")
        self._file.seek(offset)
        row: dict[str, Any] = json.loads(self._file.readline())
        return row


@dataclass(frozen=True)
class StoredRows:
    """Samples to be written, as rows of a store.

    Attributes:
        store: holds the rows; must outlive the producer.
        producer: makes samples of rows, given their offsets.
        classes: names of the labels, where they have names.
        plan: what decides the bytes, beside the rows.
    """

    store: RowStore
    producer: Producer[int]
    classes: list[str] | None
    plan: dict[str, Any]
