"""Ports for processes that listen later, and by a number that they are given."""

from __future__ import annotations

import fcntl
import os
import socket
import tempfile
from functools import cache
from itertools import count
from pathlib import Path
from typing import IO

_FIRST, _BLOCKS, _PORTS = 12_000, 64, 250  # all below 28000, where launchers look for one, as the kernel does above
_taken = count()
_held: list[IO[str]] = []


def free_port() -> int:
    """No other socket's now, and nobody else's until it is listened on, seconds later.

    A process of tests has a block of ports to itself, be it a worker of pytest-xdist or a session beside this one:
    ranks that met on one port of two runs would hear each other's tensors.
    """
    for _ in range(_PORTS):
        port = _block() + next(_taken) % _PORTS
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError(f"none of {_PORTS} ports from {_block()} on is free")


@cache
def _block() -> int:
    """The first port of a block, locked for as long as this process lives."""
    folder = Path(tempfile.gettempdir()) / f"ports-of-tests-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    for number in range(_BLOCKS):
        file = (folder / str(number)).open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            continue
        _held.append(file)
        return _FIRST + number * _PORTS
    raise AssertionError(f"each of {_BLOCKS} blocks of ports is another process's")
