"""N ranks on this machine, started and stopped together, however one of them or the launcher ends.

They are all ranks of a run, or those of one node of a job (`Place`).
"""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from math import inf
from queue import Empty, SimpleQueue

from data_pipeline.errors import RunError
from data_pipeline.messages import killed_by
from launch.ranks.child import HEARING_SECONDS, handled_by, start_child
from pretrain.runtime.signals import STOP_SIGNALS, STOPPED


@dataclass(frozen=True)
class Ended:
    """A rank has ended; a negative status is the signal that killed it."""

    rank: int
    status: int


@dataclass(frozen=True)
class SignalReceived:
    """The launcher was sent a signal; `signum` is what the ranks are sent for it.

    Attributes:
        ends: it stops, and is not the first that does: the ranks are killed.
    """

    signum: int
    sent: int
    ends: bool = False


@dataclass(frozen=True)
class Place:
    """The place of this machine's ranks among all.

    Attributes:
        first_rank: number of this machine's first rank.
        world_size: number of ranks on all machines; None: this machine has all.
        master: address and port at which rank 0 listens; None: a free port of this machine.
        environment: further variables for each rank.
    """

    first_rank: int = 0
    world_size: int | None = None
    master: tuple[str, int] | None = None
    environment: Mapping[str, str] = field(default_factory=dict)


# Ranks that save when they are asked to stop are asked by SIGUSR2: what sent SIGTERM may have sent it to them as well,
# and would be taken for a second one.
SAVING: Mapping[int, int] = dict.fromkeys(STOP_SIGNALS, signal.SIGUSR2)

Events = SimpleQueue[Ended | SignalReceived]  # of the queues, the one that a signal handler may put into


def launch(
    arguments: Sequence[str],
    num_ranks: int,
    *,
    module: str = "pretrain",
    threads: int | None = None,
    grace_seconds: float = 10.0,
    place: Place | None = None,
    passed_on: Mapping[int, int] | None = None,
    second_ends: bool = True,
    seconds_left: Callable[[int], float | None] = lambda signum: None,
) -> int:
    """Runs `python -m MODULE ARGUMENTS` as so many ranks and waits for all of them.

    They find each other as under torchrun (RANK, WORLD_SIZE, MASTER_ADDR, ...). The first writes to the stdout
    and stderr of this process; the lines of the others go to stderr behind `[rank N] `. When one fails, the
    others get SIGTERM and after a grace SIGKILL. Signals are passed on. Main thread only: a rank is killed when
    the thread that started it ends.

    Args:
        threads: OMP_NUM_THREADS of each rank; None: as it is set, or cores / num_ranks.
        grace_seconds: between asking a rank to stop and killing it.
        place: of this machine's ranks among all; None: they are all.
        passed_on: signals that reach ranks as others: `SAVING` for ranks that save when they are asked to stop, which
            take as long as they need.
        second_ends: a second signal that stops kills the ranks.
        seconds_left: until whoever sent a signal kills all of this; ranks that stop at it are killed by then. None:
            they may take as long as they need.

    Returns:
        0 when all ranks returned 0; 128 + N when signal N, not passed on as another, or a second one, stopped the
        launcher; else the exit status of the first rank that failed, 128 + N where signal N killed it.
    """
    events: Events = SimpleQueue()
    place = place or Place()
    environment = _environment(num_ranks, threads, place)
    ranks: list[subprocess.Popen[str]] = []
    printers: list[threading.Thread] = []
    sent_as, stopping = passed_on or {}, list[int]()

    def receive(signum: int, frame: object) -> None:
        events.put(SignalReceived(sent_as.get(signum, signum), signum, second_ends and bool(stopping)))
        if signum in STOP_SIGNALS:
            stopping.append(signum)

    with handled_by(receive):
        try:
            for rank in range(num_ranks):
                process = _start(rank, place.first_rank + rank, environment, module, arguments)
                ranks.append(process)
                _thread(_wait, rank, process, events)
                if rank:
                    printers.append(_thread(_print_lines, place.first_rank + rank, process))
            return _supervise(ranks, events, grace_seconds, place.first_rank, seconds_left)
        finally:
            for process in ranks:
                _kill(process)
            for printer in printers:
                printer.join(timeout=5)


def _supervise(
    ranks: Sequence[subprocess.Popen[str]],
    events: Events,
    grace_seconds: float,
    first_rank: int,
    seconds_left: Callable[[int], float | None],
) -> int:
    running = set(range(len(ranks)))
    failed: Ended | None = None
    asked: SignalReceived | None = None
    deadline = inf
    to_stop = overdue = False
    while running:
        try:
            event = events.get(timeout=min(HEARING_SECONDS, max(0.0, deadline - time.monotonic())))
        except Empty:
            if time.monotonic() < deadline:
                continue
            deadline, overdue = inf, to_stop and (failed is None or failed.status == STOPPED)
            for rank in running:
                _kill(ranks[rank])
            continue
        if isinstance(event, SignalReceived):
            ends = event.ends and event.sent in STOP_SIGNALS
            to_stop = to_stop or event.signum == signal.SIGUSR2
            for rank in running:
                _kill(ranks[rank]) if ends else ranks[rank].send_signal(event.signum)
            if ends or event.signum in STOP_SIGNALS:
                asked = asked or event
            elif (left := seconds_left(event.sent)) is not None and deadline == inf:
                deadline = time.monotonic() + left
            continue
        running.discard(event.rank)
        # SIGTERM was sent to all processes of a job, when this one was done; SIGKILL by us, as it did not stop in time.
        if (to_stop and event.status == -signal.SIGTERM) or (overdue and event.status == -signal.SIGKILL):
            event = Ended(event.rank, STOPPED)
        if event.status and not asked and (not failed or failed.status == STOPPED):
            failed = event
            for rank in running if event.status != STOPPED else ():
                ranks[rank].terminate()
        stopped = failed is not None and failed.status == STOPPED  # the others are at their last save
        if (failed or asked) and not stopped and deadline == inf:
            deadline = time.monotonic() + grace_seconds
    if asked:
        return 128 + asked.sent
    return _verdict(failed, first_rank) if failed else 0


def _verdict(failed: Ended, first_rank: int) -> int:
    """Returns the exit status to pass on, and names a rank that a signal killed, which could not say so itself."""
    if failed.status < 0:
        how, rank = killed_by(-failed.status), first_rank + failed.rank
        print(f"error: rank {rank} was killed by {how}; the others were stopped", file=sys.stderr)
        return 128 - failed.status
    return failed.status


def free_port() -> int:
    """Returns a port of this machine that is free at this moment. It lies below those that the kernel gives to whoever
    asks for any, as rank 0 listens on it seconds later.
    """
    for port in random.SystemRandom().sample(range(28_000, 32_768), 64):  # never the seeded numbers of a run
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return port
    raise RunError("ports 28000 to 32767", "one that is free", "none of 64 that were tried")


def threads_per_process(num_processes: int) -> int:
    """Returns the number of threads of each of so many processes that share the cores of this machine."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return max(1, cores // num_processes)


def _environment(num_ranks: int, threads: int | None, place: Place) -> dict[str, str]:
    address, port = place.master or ("127.0.0.1", free_port())
    default_threads = os.environ.get("OMP_NUM_THREADS", str(threads_per_process(num_ranks)))
    return {
        **os.environ,
        "WORLD_SIZE": str(place.world_size or num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": str(threads or default_threads),
        "PYTHONUNBUFFERED": "1",  # a line is shown when it is written, not when a pipe is full
        **place.environment,
    }


def _start(
    local_rank: int, rank: int, environment: dict[str, str], module: str, arguments: Sequence[str]
) -> subprocess.Popen[str]:
    own = {**environment, "RANK": str(rank), "LOCAL_RANK": str(local_rank)}
    return start_child(module, arguments, environment=own, stdin=subprocess.DEVNULL, piped=local_rank > 0)


def _thread(target: object, *arguments: object) -> threading.Thread:
    thread = threading.Thread(target=target, args=arguments, daemon=True)  # type: ignore[arg-type]
    thread.start()
    return thread


def _wait(rank: int, process: subprocess.Popen[str], events: Events) -> None:
    status = process.wait()
    # Where it was asked before it could listen, there was nothing to save.
    events.put(Ended(rank, STOPPED if status == -signal.SIGUSR2 else status))


def _print_lines(rank: int, process: subprocess.Popen[str]) -> None:
    prefix = f"[rank {rank}] "
    assert process.stdout is not None
    for line in process.stdout:
        with suppress(OSError):  # a full disk costs lines; a rank whose pipe nobody empties would wait for ever
            sys.stderr.write(line if line.startswith(prefix) else prefix + line)
            sys.stderr.flush()


def _kill(process: subprocess.Popen[str]) -> None:
    """Kills a rank and what it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
