"""Commands over a folder that is read-only, full or failing, in their own process and those that they start.

Read-only and failing: the interpreter asks before it opens, makes, renames or removes something, and is refused. Full:
what is opened to be written is the kernel's own full device.
"""

from __future__ import annotations

import _io
import builtins
import errno
import io
import os
import stat
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import typer

from launch.cli import COMMANDS
from tests.commands import Done, begun
from tests.commands import program as _program

FAULTS = ("read-only", "full", "failing")
_CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def leaf_commands() -> Iterator[str]:
    """All commands, as they are called."""

    def leaves(command: Any, name: str) -> Iterator[str]:
        if isinstance(command, click.Group) or hasattr(command, "commands"):
            for word, inner in command.commands.items():
                yield from leaves(inner, f"{name} {word}")
        else:
            yield name

    for name in COMMANDS:
        yield from leaves(typer.main.get_command(import_module(f"launch.commands.{name}").app), name)


def call(fault: str, folder: Path, words: list[str]) -> Done:
    """`pretrain WORDS` to its end, while `folder` has a fault."""
    with begun(partial(_with_fault, fault, folder, words)) as command:
        return command.wait()


def _with_fault(fault: str, folder: Path, words: list[str]) -> None:
    run = _program("launch.cli", *words)
    inside = partial(_is_inside, str(folder))
    if fault == "full":
        _fill(inside)
    else:
        sys.addaudithook(partial(_refuse, inside, fault == "failing"))
    run()


def _is_inside(folder: str, path: object) -> bool:
    if not isinstance(path, str | bytes | os.PathLike):
        return False
    return os.path.abspath(os.fsdecode(path)).startswith((folder + "/", folder + "\0")) or os.fsdecode(path) == folder


def _refuse(inside: Callable[[object], bool], reads_too: bool, event: str, arguments: tuple[Any, ...]) -> None:
    number = errno.EIO if reads_too else errno.EROFS
    struck = event in _CHANGES or (event == "open" and (reads_too or (arguments[2] or 0) & _WRITES))
    if struck or (reads_too and event in ("os.listdir", "os.scandir")):
        for path in arguments[:2]:
            if inside(path):
                raise OSError(number, os.strerror(number), path)


def _fill(inside: Callable[[object], bool]) -> None:
    """Whatever is opened there to be written takes no byte; nothing can be made there."""
    full, os_open, io_open, truncate = os.open("/dev/full", os.O_RDWR), os.open, io.open, os.ftruncate

    def open_descriptor(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        file = os_open(path, flags, *rest, **more)
        if flags & _WRITES and inside(path):
            os.dup2(full, file)
        return file

    def open_file(file: Any, mode: str = "r", *rest: Any, **more: Any) -> Any:
        opened = io_open(file, mode, *rest, **more)
        if set(mode) & set("wax+") and inside(file):
            os.dup2(full, opened.fileno())
        return opened

    def ftruncate(file: int, size: int) -> None:
        if not stat.S_ISCHR(os.fstat(file).st_mode):  # of a file it would succeed, as a hole takes no room
            truncate(file, size)

    def refuse(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "os.mkdir" and inside(arguments[0]):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), arguments[0])

    os.open, os.ftruncate = open_descriptor, ftruncate  # type: ignore[assignment]
    builtins.open = io.open = _io.open = open_file  # type: ignore[assignment]
    sys.addaudithook(refuse)
