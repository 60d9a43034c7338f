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
from typing import TypeVar

from data_pipeline.errors import RunError

Task = TypeVar("Task")
Result = TypeVar("Result")


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
    try:
        running: dict[Future[Result], Task] = {}
        for task in tasks:
            running[pool.submit(function, task)] = task
            if len(running) >= 2 * workers:
                yield from _finished(running)
        while running:
            yield from _finished(running)
    except BrokenProcessPool as error:
        raise RunError(
            where="a worker process",
            expected="it to live until its work is done",
            found="it was killed, perhaps for want of memory",
            fix="Give the command again, with fewer --workers.",
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


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
