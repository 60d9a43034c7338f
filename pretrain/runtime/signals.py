"""What a signal asks of a run: to save, or to save and stop. Imports no torch: a rank listens before that is loaded."""

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


class Asked(IntEnum):
    """What a run is asked for; of several, the greatest counts."""

    NOTHING = 0
    SAVE = 1
    STOP = 2


def signals() -> dict[signal.Signals, Asked]:
    """What each signal asks for. In a job SIGTERM, a scheduler's word to every process of it, asks too."""
    asked = {signal.SIGUSR1: Asked.SAVE, signal.SIGUSR2: Asked.STOP}
    return {**asked, signal.SIGTERM: Asked.STOP} if "PRETRAIN_ATTEMPT" in os.environ else asked


class Demand:
    """Raised by a signal to any rank, at any time; answered at the next step."""

    def __init__(self) -> None:
        self.asked = Asked.NOTHING

    @contextmanager
    def by_signal(self) -> Iterator[None]:
        """Listens for the duration of a run. Only the main thread can; elsewhere nobody could send one."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {signum: signal.signal(signum, self._raise) for signum in signals()}
        try:
            yield
        finally:
            for signum, previous in before.items():
                signal.signal(signum, previous)

    def _raise(self, signum: int, frame: FrameType | None) -> None:
        self.asked = max(self.asked, signals()[signal.Signals(signum)])
