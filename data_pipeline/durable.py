"""Files that appear whole or not at all, also when the process is killed or the power fails on the way."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, BinaryIO

from data_pipeline.errors import InputError, RunError

TEMPORARY_PATTERN = ".*.tmp"  # what a killed process may leave behind; never the name of anything finished
_LEAST_ROOM = 1 << 20  # bytes: a report with its outcomes takes about 100 a sample
MAX_DEPTH = 100  # of what lies in each other in a JSON text; Python's reader and writer end at about 300
_TOO_DEEP = f"values that lie in each other more than {MAX_DEPTH} deep"


@contextmanager
def durable_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write; at the end of the block it is on disk and, in one step, stands under `path`.

    If the block raises, nothing appears and what stood there before stays.
    """
    # Not by the process id: containers and machines that share a folder may have the same ones.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with naming(path, temporary):
        try:
            with temporary.open("w+b") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):  # what went wrong before is what is told
                temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


@contextmanager
def naming(path: Path, stands_for: Path | None = None) -> Iterator[None]:
    """Gives errors of the system in its block the path that they are about, where they do not say it.

    Args:
        path: what is written.
        stands_for: another path, which errors name and nobody knows.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None or (stands_for is not None and error.filename in (stands_for, str(stands_for))):
            error.filename, error.filename2 = str(path), None
        raise


def check_writable(path: Path, what: str, fix: str) -> None:
    """Checks that a file can be written to `path` later on; nothing is left behind, no folder made.

    Args:
        path: of the file; its folder need not be there yet.
        what: the file is, for the error.
        fix: what to do, a sentence.

    Raises:
        InputError: a folder stands there, or its folder cannot be made, written to, or has no room.
    """
    told = f"a place where {what} can be written"
    if path.is_dir():
        raise InputError(where=str(path), expected=told, found="a folder of that name", fix=fix)
    folder = next(place for place in path.absolute().parents if os.path.lexists(place))
    trial = folder / f".{secrets.token_hex(4)}.tmp"
    try:
        try:
            with trial.open("wb") as file:
                file.write(bytes(_LEAST_ROOM))
                file.flush()
                os.fsync(file.fileno())
        finally:
            trial.unlink(missing_ok=True)
    except OSError as error:
        found = f"{error.strerror or error} ({folder})"
        raise InputError(where=str(path), expected=told, found=found, fix=fix) from error


@contextmanager
def claimed(plan: Path, content: object, what: str) -> Iterator[None]:
    """The folder of a plan for this process alone, cleared of what a killed one left.

    Args:
        plan: a JSON file, written where there is none, whose lock is the claim.
        content: of the plan.
        what: is written into the folder, for the error.

    Raises:
        RunError: another process has it, or had another plan for it in the same moment.
    """
    plan.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=1) + "\n"
    if not plan.exists():
        _write_first(plan, text.encode())
    with plan.open("r+b") as lock:  # to write, as NFS locks nothing else for one process alone
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunError(
                where=str(plan.parent), expected=f"one process to write {what}", found="another at work on it"
            ) from error
        if json.load(lock) != json.loads(text):
            raise RunError(
                where=str(plan.parent), expected=f"one plan of {what}", found="another one, written just now",
                fix="Give another folder.",
            )  # fmt: skip
        if not os.fstat(lock.fileno()).st_nlink:
            raise RunError(str(plan), f"the plan of {what}", "one that was taken back just now", "Start it again.")
        for left in plan.parent.glob(TEMPORARY_PATTERN):
            left.unlink()
        yield


def _write_first(path: Path, content: bytes) -> None:
    """A whole file, unless there is one: the other may be open and locked, and would be so under no name any more."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.link(temporary, path)
    except OSError as error:
        if error.errno in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS) and temporary.exists():
            os.replace(temporary, path)  # on storage that has no second names
        elif error.errno != errno.EEXIST and not path.exists():  # there now, its holder has cleared this one away
            raise
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def has_other_files(folder: Path) -> bool:
    """Whether there is anything in a folder that is more than what a killed, or another, process is writing."""
    return any(not fnmatch(name, TEMPORARY_PATTERN) for name in os.listdir(folder))  # one look: others write just now


def write_text(path: Path, text: str) -> None:
    """A whole file, in a folder that is made where it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with durable_file(path) as file:
        file.write(text.encode())


def append_line(path: Path, record: Mapping[str, Any], *, durable: bool = False) -> None:
    """A JSON object as a line at the end of a file; behind a line that a kill tore it begins a new one."""
    with naming(path), path.open("ab+", buffering=0) as file:
        torn = file.tell() > 0 and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n"
        file.write(b"\n" * torn + json.dumps(record).encode() + b"\n")
        if durable:
            os.fsync(file.fileno())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in a file of a JSON object a line; a line that a kill tore is passed over, no file has none."""
    found = []
    try:
        text = path.read_text("utf-8", "replace")
    except FileNotFoundError:
        return []
    for line in text.splitlines():
        try:
            value = from_json(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def from_json(text: str | bytes) -> Any:
    """The value of a JSON text; ValueError where it is none, or its parts lie too deep in each other to handle."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(MAX_DEPTH):
        level = [part for one in level for part in _parts(one) if isinstance(part, dict | list)]
        if not level:
            return value
    raise ValueError(_TOO_DEEP)


def _parts(container: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return container.values() if isinstance(container, dict) else container


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable: a rename is safe only once its folder is on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with naming(folder):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
