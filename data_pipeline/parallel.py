"""Work spread over processes that end with the one that started them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for_sentinel
from multiprocessing.process import BaseProcess
from typing import TypeVar

from data_pipeline.errors import RunError
from data_pipeline.messages import killed_by

Task = TypeVar("Task")
Result = TypeVar("Result")

SECONDS_OF_DYING = 30.0  # at most, between the end of a process's connections and its own


def num_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_parallel(
    function: Callable[[Task], Result], tasks: Iterable[Task], *, workers: int
) -> Iterator[tuple[Task, Result]]:
    """Yield (task, function(task)) as they are done, in any order.

    Args:
        function: picklable; an error in it ends the whole.
        tasks: picklable; taken lazily, two per worker ahead.
        workers: processes; with 0 or 1 the work is done in this one, in order.

    Raises:
        RunError: a worker process was killed.
    """
    if workers <= 1:
        yield from ((task, function(task)) for task in tasks)
        return
    # Spawned, not forked: a progress bar's thread and torch's may hold locks that a fork would copy.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_follow_parent)
    others, ours = set(multiprocessing.active_children()), set[BaseProcess]()
    try:
        running: dict[Future[Result], Task] = {}
        for task in tasks:
            running[pool.submit(function, task)] = task
            ours = ours or set(multiprocessing.active_children()) - others  # all begin with the first task
            if len(running) >= 2 * workers:
                yield from _finished(running)
        while running:
            yield from _finished(running)
    except BrokenProcessPool as error:
        pool.shutdown()  # which waits for them
        raise RunError(
            where="a worker process",
            expected="a process that lives until its work is done",
            found=f"one that {how_one_died(ours) or 'was lost'}",
            fix="Give the command again, with fewer --workers.",
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def how_one_died(processes: Iterable[BaseProcess]) -> str:
    """What became of the first process that ended by itself; the others are asked to end because of it.

    Returns:
        Words such as `was killed by SIGKILL`; empty: of none it is known.
    """
    processes = list(processes)
    if not processes:
        return ""
    ready = wait_for_sentinel([process.sentinel for process in processes], SECONDS_OF_DYING)
    for process in processes:
        if process.sentinel in ready:  # it has closed its files, a moment before it has an exit status
            process.join(SECONDS_OF_DYING)
    ends = [process.exitcode for process in processes]
    found = next((end for end in ends if end and end != -signal.SIGTERM), 0)
    if not found:
        return ""
    return f"was killed by {killed_by(-found)}" if found < 0 else f"ended with exit status {found}"


def _finished(running: dict[Future[Result], Task]) -> Iterator[tuple[Task, Result]]:
    done, _ = wait(running, return_when=FIRST_COMPLETED)
    for future in done:
        yield running.pop(future), future.result()


def _follow_parent() -> None:
    """In a worker: leave Ctrl-C to the parent, and end as soon as the parent does, even if it was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait_for_sentinel([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
