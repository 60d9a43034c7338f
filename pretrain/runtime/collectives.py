"""Which process this is among how many, and the few collectives that the trainer itself needs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline.errors import InputError

T = TypeVar("T")
Group = dist.ProcessGroup | None


@dataclass(frozen=True)
class World:
    """A process's place in the job, as torchrun's environment variables say it."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @classmethod
    def from_environment(cls) -> World:
        """Reads RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE; without the first two this process is alone.

        Raises:
            InputError: a part of them is missing or wrong: a rank that took itself for all would train alone.
        """
        given = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE") if name in os.environ}
        if not given or given == {"WORLD_SIZE": "1"}:
            return cls()
        _refuse_missing("RANK", "WORLD_SIZE")
        size, rank = (_whole(name) for name in ("WORLD_SIZE", "RANK"))
        if rank >= size:
            raise _wrong_variables("RANK", f"less than WORLD_SIZE, which is {size}", str(rank))
        local_rank, local_size = _whole("LOCAL_RANK", 0), _whole("LOCAL_WORLD_SIZE", size)
        return cls(rank=rank, size=size, local_rank=local_rank, local_size=local_size)

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def _refuse_missing(*names: str) -> None:
    if missing := [name for name in names if not os.environ.get(name)]:
        raise _wrong_variables(", ".join(missing), "a value", "none")


def _whole(name: str, default: int = 0) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise _wrong_variables(name, "a whole number", repr(text))
    return int(text)


def _wrong_variables(names: str, expected: str, found: str) -> InputError:
    fix = "Start ranks with torchrun, srun or `pretrain train --nproc N`; for one process, unset RANK and WORLD_SIZE."
    return InputError(f"{names} in the environment", expected, found, fix)


@contextmanager
def process_group(world: World, device: torch.device, seconds: float = 1800) -> Iterator[None]:
    """Joins all ranks for the duration of a run; one process needs no rendezvous address.

    Args:
        seconds: how long a rank waits for the others in a collective.

    Raises:
        InputError: there is no address at which several ranks could meet.
    """
    if world.size > 1:
        _refuse_missing("MASTER_ADDR", "MASTER_PORT")
    backend = "nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store = torch._C._distributed_c10d.HashStore() if world.size == 1 else None
    timeout = timedelta(seconds=seconds)
    dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=timeout)
    yield
    dist.destroy_process_group()  # not after an error: NCCL would wait there for ranks that wait for this one


def mean_over_ranks(values: dict[str, Tensor]) -> dict[str, float]:
    """The mean of named scalars over all ranks, in one fp64 all-reduce; every rank passes the same names."""
    if not values:
        return {}
    names = sorted(values)
    device = _device_of_collectives()
    stacked = torch.stack([values[name].detach().to(device, torch.float64).reshape(()) for name in names])
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(stacked)
        stacked /= dist.get_world_size()
    return dict(zip(names, stacked.tolist(), strict=True))


def _device_of_collectives() -> torch.device:
    """Where tensors must lie to be reduced; host times and losses on a GPU are reduced together."""
    on_gpu = dist.is_initialized() and dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def sum_over_ranks(values: Tensor) -> Tensor:
    """In place; returns its argument."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values


def rank_and_size() -> tuple[int, int]:
    """This process among those of the process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather_rows(values: Tensor) -> Tensor:
    """What every rank passed, in the order of ranks along the first dimension, [B, ...] -> [W * B, ...]; no gradient.

    Every rank passes the same shape.
    """
    parts = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, values.contiguous())
    return torch.cat(parts)


def side_group() -> Group:
    """All ranks once more, over gloo: for a thread beside the training's, or where no GPU should be waited for.

    It is patient: what is waited for may be a slow disk or an evaluation on one rank. A rank that died is noticed at
    once all the same, by its closed connection.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    return cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=timedelta(days=1)))


def gather_objects(value: T, group: Group = None) -> list[T]:
    """What every rank passed, in the order of ranks, on every rank. Plain data only; it travels pickled."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def greatest_of_ranks(value: int, group: Group) -> int:
    """The greatest that any rank passed; `group` is one of `side_group`."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    found = torch.tensor(int(value))
    dist.all_reduce(found, dist.ReduceOp.MAX, group=group)
    return int(found)


def from_main(value: T, group: Group = None) -> T:
    """Rank 0's value, on every rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=group)
    return box[0]


def barrier() -> None:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()
