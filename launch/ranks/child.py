"""Python modules as child processes that never outlive the process that started them.

Every process that this project starts on a machine (ranks, stages of a chain, results of a suite, the training of the
demo) is started here, and runs `launch.ranks.rank`, which asks the kernel to be killed with its parent. A child imports
this project from where its parent does: never from the folder that it happens to be started in.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from pretrain.runtime.signals import STOP_SIGNALS, STOPPED

REQUEST_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2)  # a rank answers: it saves, and goes on or stops
# How long a process that waits for others may be deaf: a signal that comes in the moment before it begins to wait, or
# to another of its threads, does not wake it, and Python answers in the main thread alone.
HEARING_SECONDS = 1.0
ROOT = Path(__file__).resolve().parents[2]  # the folder that holds our packages


def start_child(
    module: str,
    words: Sequence[str],
    *,
    environment: Mapping[str, str] | None = None,
    stdin: int | None = None,
    piped: bool = False,
    own_group: bool = True,
) -> subprocess.Popen[str]:
    """Starts `python -m MODULE WORDS`. It is killed when the thread that started it ends.

    Args:
        module: what is run.
        words: its arguments.
        environment: all of its variables; None: those of this process.
        stdin: as Popen takes it; None: that of this process.
        piped: stdout and stderr come together through a pipe; else they are those of this process.
        own_group: a process group of its own: Ctrl-C in a terminal reaches this process alone, which passes it on, and
            what the child starts can be killed with it.
    """
    return subprocess.Popen(
        python_command("launch.ranks.rank", str(os.getpid()), module, *words),
        env=child_environment(os.environ if environment is None else environment),
        stdin=stdin,
        stdout=subprocess.PIPE if piped else None,
        stderr=subprocess.STDOUT if piped else None,
        text=True,
        errors="replace",
        process_group=0 if own_group else None,
    )


def python_command(module: str, *words: str) -> list[str]:
    """Returns `python -m MODULE WORDS` with a safe path, on which the current folder is not."""
    return [sys.executable, "-P", "-m", module, *words]


def child_environment(given: Mapping[str, str]) -> dict[str, str]:
    """Returns variables with which a Python process finds our packages before all others of their names."""
    # An empty entry would be the current folder.
    others = [entry for entry in given.get("PYTHONPATH", "").split(os.pathsep) if entry not in ("", str(ROOT))]
    return {**given, "PYTHONPATH": os.pathsep.join([str(ROOT), *others])}


class Command:
    """A `pretrain` command at work as a child, to which signals are passed on."""

    def __init__(self, words: Sequence[str]) -> None:
        self._answers = words[0] == "train"  # others would be ended by SIGUSR1 and SIGUSR2, which they do not know
        self._stopped_by: list[int] = []
        self.process = start_child("launch.cli", words)

    def pass_on(self, signum: int, frame: FrameType | None = None) -> None:
        """Sends the child a signal that came to this process; in place of a second one that stops, SIGKILL.

        A training is asked to stop by SIGUSR2: what sent this signal may have sent it to the child as well, which
        would take ours for the second.
        """
        if signum in STOP_SIGNALS:
            self._stopped_by.append(signum)
            if len(self._stopped_by) > 1:
                signum = signal.SIGKILL
            elif self._answers:
                signum = signal.SIGUSR2
        elif not self._answers:
            return
        self.process.send_signal(signum)

    def wait(self) -> int:
        """Returns the exit status: STOPPED where a signal stopped this process, 128 + N where a second one, N, ended
        the child; 1 where the child was killed.
        """
        status = _ended(self.process)
        if self._stopped_by:
            return STOPPED if len(self._stopped_by) == 1 else 128 + self._stopped_by[1]
        return status if status >= 0 else 1


@contextmanager
def started_command(words: Sequence[str]) -> Iterator[Command]:
    """Runs `pretrain WORDS` beside the block, which gets its signals; it is ended with the block. Main thread only."""
    # The handlers come first: a signal before the child is there waits for it.
    waiting: list[int] = []
    command: Command | None = None

    def handler(signum: int, frame: FrameType | None) -> None:
        waiting.append(signum) if command is None else command.pass_on(signum)

    with handled_by(handler):
        command = Command(words)
        for signum in waiting:
            command.pass_on(signum)
        try:
            yield command
        finally:
            if command.process.poll() is None:
                command.process.terminate()
            _ended(command.process)


def _ended(process: subprocess.Popen[str]) -> int:
    """Waits for a process to end, and hears signals meanwhile."""
    while True:
        with suppress(subprocess.TimeoutExpired):
            return process.wait(HEARING_SECONDS)


def run_command(words: Sequence[str]) -> int:
    """Runs `pretrain WORDS` to its end and returns its exit status, as of `Command.wait`."""
    with started_command(words) as command:
        return command.wait()


@contextmanager
def handled_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Gives signals that stop or ask to the handler, except those that stop and that this process was told to ignore
    (nohup). A request that it ignored until now, as there was nobody to pass it on to, is heard.
    """
    before = {signum: signal.getsignal(signum) for signum in (*STOP_SIGNALS, *REQUEST_SIGNALS)}
    for signum in STOP_SIGNALS:
        if before[signum] is signal.SIG_IGN:
            del before[signum]
    for signum in before:
        signal.signal(signum, handler)
    try:
        yield
    finally:
        for signum, previous in before.items():
            signal.signal(signum, previous)
