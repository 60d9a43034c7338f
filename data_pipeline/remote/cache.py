"""A bounded folder of files from elsewhere, shared by every process of a machine and by its runs.

A file has its own name only once it is whole and checked. While it is fetched it is called `.KEY.SIZE.tmp`, and
whoever fetches it holds a lock on it: a second process waits instead of fetching it too, and a file without a
holder is what a killed process left. A file that is dropped while it is read stays readable until it is closed.

Beside each file a note, `.KEY.ok`, holds the size and the inode with which it was checked. A file that is no longer so,
or has no note, is checked again before it is used, and fetched again where it is found damaged.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from data_pipeline.errors import DataError, RunError

_MOST_REMOVALS = 10  # of one file by somebody else, while it is fetched
_MODES = {os.O_RDONLY: "rb", os.O_WRONLY: "wb", os.O_RDWR: "r+b"}
_FULL = (errno.ENOSPC, errno.EDQUOT)
# Nothing else in the folder is ever counted or removed: a user may give one that holds other things.
_KEPT = re.compile(r"[0-9a-f]{64}\.(?:tar|idx)")
_ON_ITS_WAY = re.compile(rf"\.{_KEPT.pattern}\.([0-9]+)\.tmp")


@dataclass(frozen=True)
class Cache:
    """Files by key, `SHA256.tar` or `SHA256.idx`: of which shard, wherever it came from."""

    folder: Path
    max_bytes: int

    def open(
        self, key: str, num_bytes: int, fetch: Callable[[Path], object], check: Callable[[Path], object]
    ) -> BinaryIO:
        """The file `key`, opened for reading; fetched first if it is not there, or not what was put there.

        Args:
            num_bytes: room that it takes.
            fetch: writes the whole file to a path and checks it there, or raises.
            check: raises a DataError where the file at a path is damaged.

        Raises:
            DataError: it does not fit with what is being fetched besides.
            RunError: the folder cannot be written, is emptied again and again, or holds somebody else's file or link.
        """
        path = self.folder / key
        with self._errors_named():
            for _ in range(_MOST_REMOVALS):
                with suppress(FileNotFoundError):  # somebody else cleans the folder
                    return self._found_or_fetched(path, num_bytes, fetch, check)
        raise RunError(
            where=f"{self.folder} (data.cache.folder)",
            expected=f"{key} to stay until it is opened",
            found=f"that something else removed it {_MOST_REMOVALS} times",
            fix="Give a folder that nothing else cleans.",
        )

    def distrust(self, key: str) -> None:
        """The file `key` is checked again when it is opened next: bytes that were read from it were wrong."""
        with self._errors_named():
            self._note(self.folder / key).unlink(missing_ok=True)

    def _found_or_fetched(
        self, path: Path, num_bytes: int, fetch: Callable[[Path], object], check: Callable[[Path], object]
    ) -> BinaryIO:
        while True:
            if (file := self._checked(path, check)) is not None:
                return file
            with self._claimed(path, num_bytes) as part:
                if part is not None:
                    self._make_room(num_bytes)
                    fetch(part)
                    self._finish(part, path)

    def _checked(self, path: Path, check: Callable[[Path], object]) -> BinaryIO | None:
        """The file, opened, if it is there and whole; one that is damaged is removed."""
        try:
            file = self._open_own(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        with suppress(PermissionError):  # of the folder's owner
            os.utime(file.fileno())  # "opened last"; access times are often off
        if _read_or_empty(self._note(path)) == _fingerprint(file):
            return file
        try:
            check(path)
        except DataError:
            with self._locked():
                if _is_at(file, path):
                    path.unlink()
            file.close()
            print(f"{path} was damaged on this disk and is fetched again", file=sys.stderr, flush=True)
            return None
        self._take_note(file, path)
        return file

    def _note(self, path: Path) -> Path:
        return path.with_name(f".{path.name}.ok")

    def _take_note(self, file: BinaryIO, path: Path) -> None:
        with suppress(OSError):  # without it the file is checked once more
            note = self._note(path)
            note.unlink(missing_ok=True)
            with self._open_own(note, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as written:
                written.write(_fingerprint(file))

    def _open_own(self, path: Path, flags: int) -> BinaryIO:
        """Opens a file of the folder, which may be shared: raises RunError for a link or another user's file, in whose
        place that user can put anything at any time.
        """
        try:
            number = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise self._not_ours(path, "a link") from None
            raise
        file = os.fdopen(number, _MODES[flags & os.O_ACCMODE], 0)
        found = os.fstat(number)
        if not stat.S_ISREG(found.st_mode) or (flags & os.O_ACCMODE != os.O_RDONLY and found.st_nlink > 1):
            file.close()
            raise self._not_ours(path, "something else")
        if found.st_uid not in (os.geteuid(), self.folder.stat().st_uid):  # on some NFS root's own are nobody's
            file.close()
            raise self._not_ours(path, f"one of user {found.st_uid}")
        return cast(BinaryIO, file)

    def _not_ours(self, path: Path, found: str) -> RunError:
        return RunError(
            where=str(path), expected="a file that this user's runs have put there", found=found,
            fix="Give a folder of your own as data.cache.folder, or remove the file.",
        )  # fmt: skip

    @contextmanager
    def _claimed(self, path: Path, num_bytes: int) -> Iterator[Path | None]:
        """The path to fetch `path` to, this caller's alone; None where another has just fetched it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{num_bytes}.tmp")
        with self._open_own(part, os.O_RDWR | os.O_CREAT) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                if not _is_at(file, part):
                    yield None
                elif path.exists():
                    part.unlink(missing_ok=True)
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
                self._take_note(file, path)

    def _make_room(self, num_bytes: int) -> None:
        """Drop the files that were opened longest ago until all, with those on their way, are within the bound."""
        with self._locked():
            on_their_way, kept = 0, []
            for entry in os.scandir(self.folder):
                if _KEPT.fullmatch(entry.name):
                    with suppress(FileNotFoundError):
                        found = entry.stat(follow_symlinks=False)
                        kept.append((found.st_mtime_ns, found.st_size, Path(entry.path)))
                elif (part := _ON_ITS_WAY.fullmatch(entry.name)) and not _removed_if_left(Path(entry.path)):
                    on_their_way += int(part[1])
            excess = on_their_way + sum(size for _, size, _ in kept) - self.max_bytes
            for _, size, path in sorted(kept):
                if excess <= 0:
                    return
                path.unlink(missing_ok=True)
                self._note(path).unlink(missing_ok=True)
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
        with self._open_own(self.folder / ".lock", os.O_RDWR | os.O_CREAT) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(file, fcntl.LOCK_UN)

    @contextmanager
    def _errors_named(self) -> Iterator[None]:
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


def _fingerprint(file: BinaryIO) -> bytes:
    found = os.fstat(file.fileno())
    return f"{found.st_size} {found.st_ino}\n".encode()


def _read_or_empty(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


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
