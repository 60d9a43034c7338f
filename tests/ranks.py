"""Runs a function in N real processes, and brings back what each returned or raised."""

from __future__ import annotations

import faulthandler
import io
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.multiprocessing as mp

from pretrain.runtime.collectives import World, process_group
from tests.ports import free_port
from tests.time_limit import TimeIsUpError


def warm_context() -> Any:
    """Processes of it are forked from one that has imported what is slow to import: tests/warm.py."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["tests.warm"])
    return context


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """`function(world, *args)` on every rank, joined by gloo; the results in the order of ranks.

    Functions must be importable.
    """
    with started(function, world_size, *args, joined=True) as ranks:
        return ranks.results()


@contextmanager
def started(function: Callable[..., Any], world_size: int, *args: Any, joined: bool) -> Iterator[Ranks]:
    """The processes at work; killed at the end.

    Args:
        joined: into a process group; else the function does that itself.
    """
    ranks = Ranks(function, world_size, args, joined)
    try:
        yield ranks
    except TimeIsUpError:
        ranks.print_stacks()
        raise
    finally:
        ranks.end()


class Ranks:
    def __init__(self, function: Callable[..., Any], world_size: int, args: tuple[Any, ...], joined: bool) -> None:
        port = free_port()
        context = warm_context()
        self._queue = context.Queue()
        self.processes = [
            context.Process(target=_rank, args=(self._queue, function, rank, world_size, port, joined, args))
            for rank in range(world_size)
        ]
        for process in self.processes:
            process.start()
        self._whole = False

    def results(self, timeout: float = 1800) -> list[Any]:
        """What each returned, in the order of ranks; an AssertionError with the traceback of the first that failed."""
        results: dict[int, Any] = {}
        for _ in self.processes:
            rank, ok, value = self._queue.get(timeout=timeout)
            assert ok, f"rank {rank} failed:\n{value}"
            results[rank] = torch.load(io.BytesIO(value), weights_only=False)
        self._whole = True
        return [results[rank] for rank in range(len(self.processes))]

    def print_stacks(self) -> None:
        """Where each that is still at work stands, to stderr."""
        for process in self.processes:
            if process.is_alive():
                os.kill(process.pid, signal.SIGQUIT)
                time.sleep(0.5)  # one after the other, and before they are killed

    def end(self) -> None:
        for process in self.processes:
            process.join(timeout=20 if self._whole else 0.1)
            if process.is_alive():
                process.kill()
                process.join()


def _rank(
    queue: Any, function: Callable[..., Any], rank: int, size: int, port: int, joined: bool, args: tuple[Any, ...]
) -> None:
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(size),
    }
    torch.set_num_threads(1)
    faulthandler.register(signal.SIGQUIT)
    try:
        world = World.from_environment()
        if joined:
            with process_group(world, torch.device("cpu")):
                value = function(world, *args)
        else:
            value = function(world, *args)
        result = io.BytesIO()
        torch.save(value, result)  # whole, as shared tensors die with their process
        queue.put((rank, True, result.getvalue()))
    except BaseException:
        queue.put((rank, False, traceback.format_exc()))
