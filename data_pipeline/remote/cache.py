"""A bounded folder of files from elsewhere, shared by every process of a machine and by its runs.

A file has its own name only once it is whole and checked. While it is fetched it is called `.KEY.SIZE.tmp`, and
whoever fetches it holds a lock on it: a second process waits instead of fetching it too, and a file without a
holder is what a killed process left. A file that is dropped while it is read stays readable until it is closed.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from data_pipeline.errors import DataError, RunError

_FULL = (errno.ENOSPC, errno.EDQUOT)
# Nothing else in the folder is ever counted or removed: a user may give one that holds other things.
_KEPT = re.compile(r"[0-9a-f]{64}\.(?:tar|idx)")
_ON_ITS_WAY = re.compile(rf"\.{_KEPT.pattern}\.([0-9]+)\.tmp")


@dataclass(frozen=True)
class Cache:
    """Files by key, `SHA256.tar` or `SHA256.idx`: of which shard, wherever it came from."""

    folder: Path
    max_bytes: int

    def open(self, key: str, num_bytes: int, fetch: Callable[[Path], object]) -> BinaryIO:
        """The file `key`, opened for reading; fetched first if it is not there.

        Args:
            num_bytes: room that it takes.
            fetch: writes the whole file to a path and checks it there, or raises.

        Raises:
            DataError: it does not fit with what is being fetched besides.
            RunError: the folder cannot be written.
        """
        path = self.folder / key
        with self._told():
            while True:
                with suppress(FileNotFoundError):
                    return _opened(path)
                with self._claimed(path, num_bytes) as part:
                    if part is not None:
                        self._make_room(num_bytes)
                        fetch(part)
                        self._finish(part, path)

    @contextmanager
    def _claimed(self, path: Path, num_bytes: int) -> Iterator[Path | None]:
        """The path to fetch `path` to, this caller's alone; None where another has just fetched it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{num_bytes}.tmp")
        with part.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                if not _is_at(file, part):
                    yield None
                elif path.exists():
                    part.unlink()
                    yield None
                else:
                    try:
                        yield part
                    except BaseException:
                        part.unlink(missing_ok=True)
                        raise
            finally:
                fcntl.flock(file, fcntl.LOCK_UN)  # closing alone would leave it to a process forked meanwhile

    def _finish(self, part: Path, path: Path) -> None:
        with part.open("rb") as file:
            os.fsync(file.fileno())
        with self._locked():
            part.replace(path)

    def _make_room(self, num_bytes: int) -> None:
        """Drop the files that were opened longest ago until all, with those on their way, are within the bound."""
        with self._locked():
            on_their_way, kept = 0, []
            for entry in os.scandir(self.folder):
                if _KEPT.fullmatch(entry.name):
                    found = entry.stat()
                    kept.append((found.st_mtime_ns, found.st_size, entry.path))
                elif (part := _ON_ITS_WAY.fullmatch(entry.name)) and not _removed_if_left(Path(entry.path)):
                    on_their_way += int(part[1])
            excess = on_their_way + sum(size for _, size, _ in kept) - self.max_bytes
            for _, size, name in sorted(kept):
                if excess <= 0:
                    return
                os.unlink(name)
                excess -= size
        if excess > 0:
            raise DataError(
                where="data.cache.max_gb",
                expected=f"room for {on_their_way / 1e9:.3g} GB that are fetched at once",
                found=f"{self.max_bytes / 1e9:.3g} GB in {self.folder}, {num_bytes / 1e9:.3g} GB of them for one file",
                fix="Raise it, or have fewer runs share the folder.",
            )

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with (self.folder / ".lock").open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(file, fcntl.LOCK_UN)

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            full = error.errno in _FULL
            raise RunError(
                where=f"{self.folder} (data.cache.folder)",
                expected="a folder that can be written, with room for data.cache.max_gb",
                found=error.strerror or str(error),
                fix="Lower data.cache.max_gb, or free space." if full else "Give another folder.",
            ) from error


def _opened(path: Path) -> BinaryIO:
    file = path.open("rb", buffering=0)
    with suppress(PermissionError):  # another user's
        os.utime(file.fileno())  # "opened last"; access times are often off
    return file


def _is_at(file: BinaryIO, path: Path) -> bool:
    """Whether the open file is still the one of this name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _removed_if_left(part: Path) -> bool:
    """Remove what a killed process left behind; False where somebody is at work on it."""
    try:
        with part.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            try:
                if _is_at(file, part):
                    part.unlink()
            finally:
                fcntl.flock(file, fcntl.LOCK_UN)
    except FileNotFoundError:
        return True
    except BlockingIOError:
        return False
    return True
