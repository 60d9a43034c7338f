"""Runs a function in N real processes joined by gloo, and brings back what each returned or raised."""

from __future__ import annotations

import io
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as mp

from pretrain.collectives import World, process_group


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """`function(world, *args)` on every rank; the results in the order of ranks. Functions must be importable."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["deepspeed", "timm", "tests.ranks"])
    queue = context.Queue()
    processes = [
        context.Process(target=_rank, args=(queue, function, rank, world_size, port, args), daemon=False)
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    results: dict[int, Any] = {}
    try:
        for _ in processes:
            rank, ok, value = queue.get(timeout=300)
            assert ok, f"rank {rank} failed:\n{value}"
            results[rank] = torch.load(io.BytesIO(value), weights_only=False)
    finally:
        for process in processes:
            process.join(timeout=20 if len(results) == world_size else 0.1)
            if process.is_alive():
                process.kill()
    return [results[rank] for rank in range(world_size)]


def _rank(queue: Any, function: Callable[..., Any], rank: int, size: int, port: int, args: tuple[Any, ...]) -> None:
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
    }
    os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size)}
    torch.set_num_threads(1)
    try:
        world = World.from_environment()
        with process_group(world, torch.device("cpu")):
            result = io.BytesIO()
            torch.save(function(world, *args), result)  # whole, as shared tensors die with their process
            queue.put((rank, True, result.getvalue()))
    except BaseException:
        queue.put((rank, False, traceback.format_exc()))
