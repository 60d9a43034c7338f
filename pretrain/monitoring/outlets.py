"""Where a run's words and numbers go: what an outlet fails to take is counted and said, and costs the run nothing else.

A full disk, a terminal that is gone or a service that does not answer costs lines. What must last (checkpoints and
exports) goes by none of this: there a failure is the run's.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.url_secrets import without_secrets


class Outlet:
    """The one guard of everything that takes a run's lines, numbers or pictures.

    Attributes:
        name: in messages.
        lost: how often it failed to take something.

    Args:
        name: in messages.
        say: receives a sentence when it begins to fail, and when it works again.
        errors: that count as its failing; anything else is an error of ours, and raised.
    """

    def __init__(self, name: str, say: Callable[[str], None], errors: tuple[type[Exception], ...] = (OSError,)) -> None:
        self.name, self.lost = name, 0
        self._say, self._errors = say, errors
        self._reason = ""
        self._failing = False

    def give(self, deliver: Callable[[], object]) -> bool:
        """Calls `deliver`, which hands one thing over. Returns whether it was taken."""
        taken = self._try(deliver)
        if taken and self._failing:
            self._failing = False
            self._say(f"{self.name} works again; {self.loss()}")
        return taken

    def end(self, close: Callable[[], object]) -> None:
        """Calls `close`, after which nothing is taken any more."""
        self._try(close)

    def _try(self, work: Callable[[], object]) -> bool:
        try:
            work()
        except self._errors as error:
            self.lost += 1
            reason = error.strerror if isinstance(error, OSError) else None
            self._reason = reason or f"{type(error).__name__}: {error}"
            if not self._failing:
                self._failing = True  # before it says so, perhaps through itself
                self._say(f"{self.name}: {self._reason}; the run goes on without it")
            return False
        return True

    def loss(self) -> str:
        """Says what was lost; empty: nothing."""
        return f"{self.lost:,} lost ({self._reason})" if self.lost else ""


class AppendedFile:
    """A file that grows by whole pieces: one that does not fit leaves nothing behind. It is opened when it is written.

    Args:
        path: of the file; its folder is made.
        head: what a new file begins with.
    """

    def __init__(self, path: Path, head: Callable[[], bytes] = bytes) -> None:
        self._path, self._head = path, head
        self._file: int | None = None

    def write(self, data: bytes) -> None:
        """
        Raises:
            OSError: it was not written.
        """
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                self._append(file, self._head() if os.fstat(file).st_size == 0 else b"")
            except BaseException:
                os.close(file)
                raise
            self._file = file
        self._append(self._file, data)

    def write_line(self, line: str) -> None:
        """
        Raises:
            OSError: it was not written.
        """
        self.write(line.encode() + b"\n")

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
        self._file = None

    @staticmethod
    def _append(file: int, data: bytes) -> None:
        size = os.fstat(file).st_size
        try:
            write_whole(file, data)
        except BaseException:
            with suppress(OSError):
                os.ftruncate(file, size)
            raise


def write_whole(file: int, data: bytes) -> None:
    """Writes all of it to a descriptor, however many writes that takes.

    Raises:
        OSError: not all was written.
    """
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]


def write_stdout(text: str) -> None:
    """Writes to stdout past Python's buffer, which would keep what it could not write and fail with it again and again.

    Raises:
        OSError: it was not written.
    """
    sys.stdout.flush()
    try:
        file = sys.stdout.fileno()
    except (OSError, ValueError):  # a stand-in that is no file
        sys.stdout.write(text)
        return
    write_whole(file, text.encode(sys.stdout.encoding or "utf-8", "replace"))


def write_stderr(text: str) -> None:
    """Writes a line to stderr; where that fails there is nobody left to tell."""
    with suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


def hide_secrets() -> None:
    """From now on, whatever this process prints shows no secret of a URL: also a traceback, a warning of a library, or
    an answer to a wrong command line.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and not isinstance(stream.write, _Hiding):
            stream.write = _Hiding(stream.write)  # type: ignore[method-assign]


@dataclass(frozen=True)
class _Hiding:
    """The `write` of a stream, in its place."""

    write: Callable[[str], int]

    def __call__(self, text: str) -> int:
        self.write(without_secrets(text))
        return len(text)


def flush_streams() -> None:
    """Empties stdout and stderr before the end of a process; what they do not take any more is dropped.

    Python would try once more as it ends, and end with a status of its own where that fails.
    """
    for name in ("stdout", "stderr"):
        try:
            getattr(sys, name).flush()
        except (OSError, ValueError):
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
