"""N ranks on this machine, started and stopped together, however one of them or the launcher ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from types import FrameType

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ASKING = (signal.SIGUSR1,)  # a rank answers it and goes on


@dataclass(frozen=True)
class Ended:
    """A rank is no more; a negative status is the signal that killed it."""

    rank: int
    status: int


@dataclass(frozen=True)
class Asked:
    """The launcher was sent a signal."""

    signum: int


Events = SimpleQueue[Ended | Asked]  # of the queues, the one that a signal handler may put into


def launch(
    arguments: Sequence[str],
    num_ranks: int,
    *,
    module: str = "pretrain",
    threads: int | None = None,
    grace_seconds: float = 10.0,
) -> int:
    """Runs `python -m MODULE ARGUMENTS` as ranks 0 .. num_ranks-1 and waits for all of them.

    They find each other as under torchrun (RANK, WORLD_SIZE, MASTER_ADDR, ...). Rank 0 writes to the stdout
    and stderr of this process; the lines of the others go to stderr behind `[rank N] `. When one fails, the
    others get SIGTERM and after a grace SIGKILL. Signals are passed on; a second one that stops kills. Main
    thread only: a rank is killed when the thread that started it ends.

    Args:
        threads: OMP_NUM_THREADS of each rank; None: as it is set, or cores / num_ranks.
        grace_seconds: between asking a rank to stop and killing it.

    Returns:
        0 when all ranks returned 0; 128 + N when signal N stopped the launcher; else the exit status of the
        first rank that failed, 128 + N where signal N killed it.
    """
    events: Events = SimpleQueue()
    environment = _environment(num_ranks, threads)
    ranks: list[subprocess.Popen[str]] = []
    printers: list[threading.Thread] = []
    with _signals_into(events):
        try:
            for rank in range(num_ranks):
                process = _start(rank, environment, module, arguments)
                ranks.append(process)
                _thread(_wait, rank, process, events)
                if rank:
                    printers.append(_thread(_print_lines, rank, process))
            return _supervise(ranks, events, grace_seconds)
        finally:
            for process in ranks:
                _kill(process)
            for printer in printers:
                printer.join(timeout=5)


def _supervise(ranks: Sequence[subprocess.Popen[str]], events: Events, grace_seconds: float) -> int:
    running = set(range(len(ranks)))
    failed: Ended | None = None
    asked: Asked | None = None
    deadline: float | None = None
    while running:
        try:
            event = events.get(timeout=None if deadline is None else max(0.0, deadline - time.monotonic()))
        except Empty:
            deadline = None
            for rank in running:
                _kill(ranks[rank])
            continue
        if isinstance(event, Asked):
            stopping = event.signum in STOPPING
            for rank in running:
                _kill(ranks[rank]) if asked and stopping else ranks[rank].send_signal(event.signum)
            if stopping:
                asked = asked or event
            continue
        running.discard(event.rank)
        if event.status and not failed and not asked:
            failed = event
            for rank in running:
                ranks[rank].terminate()
        if (failed or asked) and deadline is None:
            deadline = time.monotonic() + grace_seconds
    if asked:
        return 128 + asked.signum
    return _verdict(failed) if failed else 0


def _verdict(failed: Ended) -> int:
    """The exit status to pass on; a rank that a signal killed could not say so itself."""
    if failed.status < 0:
        name = signal.Signals(-failed.status).name
        print(f"error: rank {failed.rank} was killed by {name}; the others were stopped", file=sys.stderr)
        return 128 - failed.status
    return failed.status


def _environment(num_ranks: int, threads: int | None) -> dict[str, str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    default_threads = os.environ.get("OMP_NUM_THREADS", str(max(1, cores // num_ranks)))
    return {
        **os.environ,
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": str(threads or default_threads),
        "PYTHONUNBUFFERED": "1",  # a line is shown when it is written, not when a pipe is full
    }


def _start(rank: int, environment: dict[str, str], module: str, arguments: Sequence[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "launch.rank", str(os.getpid()), module, *arguments],
        env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE if rank else None,
        stderr=subprocess.STDOUT if rank else None,
        text=True,
        errors="replace",
        # Ctrl-C then reaches a rank once, through us, and a rank's own children can be killed with it.
        process_group=0,
    )


def _thread(target: object, *arguments: object) -> threading.Thread:
    thread = threading.Thread(target=target, args=arguments, daemon=True)  # type: ignore[arg-type]
    thread.start()
    return thread


def _wait(rank: int, process: subprocess.Popen[str], events: Events) -> None:
    events.put(Ended(rank, process.wait()))


def _print_lines(rank: int, process: subprocess.Popen[str]) -> None:
    prefix = f"[rank {rank}] "
    assert process.stdout is not None
    for line in process.stdout:
        sys.stderr.write(line if line.startswith(prefix) else prefix + line)
        sys.stderr.flush()


def _kill(process: subprocess.Popen[str]) -> None:
    """The rank and what it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


@contextmanager
def _signals_into(events: Events) -> Iterator[None]:
    """Signals become events, except those that this process was told to ignore (nohup)."""

    def handler(signum: int, frame: FrameType | None) -> None:
        events.put(Asked(signum))

    before = {s: signal.getsignal(s) for s in (*STOPPING, *ASKING) if signal.getsignal(s) is not signal.SIG_IGN}
    for signum in before:
        signal.signal(signum, handler)
    try:
        yield
    finally:
        for signum, previous in before.items():
            signal.signal(signum, previous)
