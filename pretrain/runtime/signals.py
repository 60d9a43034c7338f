"""What a signal requests of a run: to save, or to save and stop.

This file imports no torch, as a rank listens before that is loaded.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from types import FrameType

STOPPED = 75  # exit status, EX_TEMPFAIL of sysexits.h: asked to stop; its state is saved, and the same command goes on
HUNG = 76  # exit status: the watchdog found no progress
LEAD_SECONDS = "PRETRAIN_LEAD_SECONDS"  # set by a job: between the warning of its time limit and that limit


class Request(IntEnum):
    """What a run is asked for; of several requests, the greatest counts."""

    NOTHING = 0
    SAVE = 1
    STOP = 2


def signals() -> dict[signal.Signals, Request]:
    """What each signal requests. In a job SIGTERM, which a scheduler sends to every process, is a request too."""
    requests = {signal.SIGUSR1: Request.SAVE, signal.SIGUSR2: Request.STOP}
    return {**requests, signal.SIGTERM: Request.STOP} if "PRETRAIN_ATTEMPT" in os.environ else requests


class SignalRequests:
    """What signals have requested of this rank so far; they may come at any time, and the next step answers them.

    Attributes:
        pending: the greatest request that was not answered yet.
    """

    def __init__(self) -> None:
        self.pending = Request.NOTHING

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Takes signals for the duration of a run. Only the main thread can; elsewhere nobody could send one."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {signum: signal.signal(signum, self._receive) for signum in signals()}
        try:
            yield
        finally:
            for signum, previous in before.items():
                signal.signal(signum, previous)

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        self.pending = max(self.pending, signals()[signal.Signals(signum)])
