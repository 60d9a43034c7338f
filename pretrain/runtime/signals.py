"""What a signal requests of a run: to save, or to save and stop; and that a second one ends it at once.

This file imports no torch, as a rank listens before that is loaded.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from enum import IntEnum
from types import FrameType

STOPPED = 75  # exit status, EX_TEMPFAIL of sysexits.h: asked to stop; its state is saved, and the same command goes on
HUNG = 76  # exit status: the watchdog found no progress
LEAD_SECONDS = "PRETRAIN_LEAD_SECONDS"  # set by a job: between the warning of its time limit and that limit

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # from people and whatever looks after processes
_STOPPING = "asked to stop: it saves once the step, or the evaluation, that is at work is done"
_STARTING = "asked to stop before the first step; the same command goes on"

Handler = Callable[[int, FrameType | None], None]


class Request(IntEnum):
    """What a run is asked for; of several requests, the greatest counts."""

    NOTHING = 0
    SAVE = 1
    STOP = 2


def signals() -> dict[signal.Signals, Request]:
    """What each signal requests; those that this process was told to ignore (nohup) are left out."""
    stopping = [signum for signum in STOP_SIGNALS if signal.getsignal(signum) != signal.SIG_IGN]
    return {signal.SIGUSR1: Request.SAVE, **dict.fromkeys((signal.SIGUSR2, *stopping), Request.STOP)}


def second_ends() -> bool:
    """Whether a second signal that stops ends a run at once: a scheduler sends a job's as often as it likes."""
    return "PRETRAIN_ATTEMPT" not in os.environ


def tell(line: str) -> None:
    """Writes a line to stderr from inside a signal handler, where Python's own streams may be at work."""
    with suppress(OSError):
        os.write(2, f"{line}\n".encode())


def stop_while_starting(speaks: bool = True) -> None:
    """Until there is a run, there is nothing to save: a signal that stops says so and ends the process with STOPPED.

    Args:
        speaks: whether this process says it: one of several ranks does.
    """

    def end(signum: int, frame: FrameType | None) -> None:
        if speaks:
            tell(_STARTING)
        os._exit(STOPPED)

    for signum, request in signals().items():
        signal.signal(signum, signal.SIG_IGN if request == Request.SAVE else end)


class SignalRequests:
    """What signals request of this rank; they may come at any time, and the next step answers them.

    Args:
        speaks: whether this rank says what it is asked for: one of several does.
    """

    def __init__(self, speaks: bool = True) -> None:
        self._speaks, self._process = speaks, os.getpid()
        self._waiting: list[Request] = []
        self._is_to_stop, self._was_stopped = False, False  # by any request; by a signal of which a second one ends

    def take(self) -> Request:
        """Returns the greatest request since it was called last. One that comes later, as in the evaluation before a
        save, waits for the next call.
        """
        taken = self._waiting[:]
        del self._waiting[: len(taken)]
        return max(taken, default=Request.NOTHING)

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
        if os.getpid() != self._process:  # a worker, forked from this rank, whose signals are the rank's to answer
            return
        request = Request.SAVE if signum == signal.SIGUSR1 else Request.STOP
        if request == Request.STOP and not self._is_to_stop and self._speaks:
            tell(_STOPPING + ("; a second Ctrl-C or SIGTERM ends it at once" if second_ends() else ""))
        if signum in STOP_SIGNALS:
            if self._was_stopped and second_ends():
                os._exit(128 + signum)
            self._was_stopped = True
        self._is_to_stop = self._is_to_stop or request == Request.STOP
        self._waiting.append(request)
