"""What is done with DeepSpeed's own modules; the only file that imports it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from pretrain.runtime.stopwatch import Stopwatch

_COLLECTIVES = (
    "all_reduce", "all_reduce_coalesced", "all_gather", "all_gather_into_tensor", "all_gather_coalesced",
    "broadcast", "reduce", "reduce_scatter", "reduce_scatter_tensor",
)  # fmt: skip


def time_collectives(deepspeed: Any, clock: Stopwatch) -> None:
    """Books the time of DeepSpeed's collectives as "reduce"; of several engines of a process the last is timed."""
    backend = deepspeed.comm.comm.cdb

    def timed(name: str) -> Callable[..., Any]:
        real = getattr(type(backend), name)

        def collective(*args: Any, **kwargs: Any) -> Any:
            with clock.part("reduce"):
                return real(backend, *args, **kwargs)

        return collective

    for name in _COLLECTIVES:
        setattr(backend, name, timed(name))


def import_deepspeed(device: torch.device) -> Any:
    """Imports DeepSpeed for a device, quietly: its logger would write over the progress line."""
    if device.type == "cpu":  # its accelerator is chosen at import
        os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.setdefault("LOCAL_RANK", "0")  # it refuses a process that no launcher started
    import deepspeed

    # Its shared-memory kernel serves inference only, and a process killed while compiling it leaves a lock behind
    # on which every later run would wait for ever.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel(logging.ERROR)
    deepspeed.init_distributed(dist_backend="gloo" if device.type == "cpu" else "nccl", auto_mpi_discovery=False)
    return deepspeed


def register_shared_parameters(deepspeed: Any, objective: nn.Module) -> None:
    """Has parameters gathered at ZeRO 3 that are used while the forward of their own module is not running.

    Those of a module that has children may be: MAE reads a ViT's position embedding so. DeepSpeed notices such a use
    only when the parameter happens to be sharded at that moment, and fails when that comes late; as the objective's
    own they are gathered always.
    """
    module: Any
    for module in objective.modules():
        if isinstance(module, nn.MultiheadAttention):  # never calls its last layer, but uses its weights
            for p in module.out_proj.parameters():
                deepspeed.zero.register_external_parameter(module, p)
        elif module is not objective and next(module.children(), None) is not None:
            for p in module.parameters(recurse=False):
                deepspeed.zero.register_external_parameter(objective, p)
        if hasattr(module, "get_cast_dtype"):  # open_clip's towers ask one weight for its type
            deepspeed.zero.register_external_parameter(objective, module.resblocks[0].mlp.c_fc.weight)


@contextmanager
def gathered(parameter: nn.Parameter) -> Iterator[None]:
    """At ZeRO 3 a parameter is whole on every rank inside; every rank must enter."""
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        yield
