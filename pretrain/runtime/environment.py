"""The hardware and software that a run uses: chosen, pinned, and written down."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import torch

from data_pipeline.errors import InputError
from pretrain.runtime.collectives import World
from pretrain.runtime.slurm_step import has_own_gpu
from pretrain.runtime.versions import commit, installed


def choose_device(wanted: Literal["auto", "cpu", "cuda"], world: World) -> torch.device:
    """Chooses this rank's device; `auto` is CUDA where it is present. A GPU that srun binds to a task is all it sees.

    Raises:
        InputError: the recipe asks for CUDA and there is none, or fewer GPUs than ranks on this machine.
    """
    present = torch.cuda.is_available()
    if wanted == "cpu" or (wanted == "auto" and not present):
        return torch.device("cpu")
    if present and torch.cuda.device_count() == 1 and has_own_gpu(world.rank, world.size):
        return torch.device("cuda", 0)
    if not present or torch.cuda.device_count() < world.local_size:
        raise InputError(
            where="runtime.device", expected=f"{world.local_size} GPU(s), one for each process on this machine",
            found=f"{torch.cuda.device_count()}", fix="Start fewer processes, or set runtime.device=cpu.",
        )  # fmt: skip
    return torch.device("cuda", world.local_rank)


def pin_threads(wanted: int | None, world: World) -> int:
    """Sets and returns the number of threads of this rank; None: its share of the cores.

    Results on a CPU are equal to the bit for one and the same number of threads.
    """
    threads = wanted or max(1, len(os.sched_getaffinity(0)) // world.local_size)
    torch.set_num_threads(threads)
    return threads


def describe(world: World, device: torch.device, threads: int, hosts: Sequence[str]) -> str:
    """Describes versions, commit, hardware and arguments as JSON; no environment variables, which may hold secrets.

    Args:
        hosts: the name of each rank's machine.
    """
    return json.dumps(
        {
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "arguments": sys.argv[1:],
            "python": platform.python_version(),
            "packages": installed(),
            "commit": commit(),
            "platform": platform.platform(),
            "cpu": _cpu_model(),
            "cores": os.cpu_count(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "threads_per_rank": threads,
            "world_size": world.size,
            "hosts": hosts,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
            "nccl": torch.cuda.nccl.version() if device.type == "cuda" else None,  # type: ignore[no-untyped-call]
        },
        indent=1,
    )


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
