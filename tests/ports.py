"""Ports for processes that listen later, and by a number that they are given."""

from __future__ import annotations

import os
import socket
from itertools import count

_FIRST, _WORKERS, _PORTS = 12_000, 4, 4_000  # all below 32768, where the kernel finds ports for whoever asks for any
_taken = count()


def free_port() -> int:
    """No other socket's now, and nobody else's until it is listened on, seconds later.

    Workers of pytest-xdist have ranges of their own; sessions beside this one begin elsewhere in them.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    for _ in range(_PORTS):
        port = _FIRST + _PORTS * (worker % _WORKERS) + (os.getpid() + next(_taken)) % _PORTS
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError(f"none of {_PORTS} ports from {_FIRST} on is free")
