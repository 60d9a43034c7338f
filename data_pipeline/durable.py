"""Files that appear whole or not at all, also when the process is killed or the power fails on the way."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

TEMPORARY_PATTERN = ".*.tmp"  # what a killed process may leave behind; never the name of anything finished


@contextmanager
def durable_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write; at the end of the block it is on disk and, in one step, stands under `path`.

    If the block raises, nothing appears and what stood there before stays.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable: a rename is safe only once its folder is on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
