"""Activation checkpointing with offload to the CPU, by fairscale; the only file that imports it."""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn


def checkpoint_activations(
    blocks: Iterable[nn.Module], *, device: torch.device, dtype: torch.dtype | None, offload: bool
) -> None:
    """Each block keeps only its input and computes the rest again in the backward pass (Chen et al. 2016, 1604.06174).

    The blocks stay the modules they are, with the names they have: their `forward` is replaced, as fairscale's
    `checkpoint_wrapper` does. That wrapper recomputes in fp32 on a CPU and in fp16 on a GPU, whatever the first pass
    computed in; autocast is therefore entered inside of what it wraps.

    Args:
        blocks: none inside another.
        device: where they compute.
        dtype: of autocast; None: no autocast.
        offload: keep the inputs in CPU memory.
    """
    from fairscale.nn.checkpoint.checkpoint_activations import _checkpointed_forward
    from fairscale.nn.checkpoint.checkpoint_utils import patch_batchnorm

    # Its own autocast, which ours overrides, is spelt the old way.
    warnings.filterwarnings("ignore", message=r".*torch\.cuda\.amp\.autocast.*", category=FutureWarning)
    for block in blocks:
        forward = _under_autocast(type(block).forward, device.type, dtype)
        patch_batchnorm(block)
        block.forward = functools.partial(_checkpointed_forward, forward, weakref.ref(block), offload)


def _under_autocast(forward: Callable[..., Any], device_type: str, dtype: torch.dtype | None) -> Callable[..., Any]:
    @functools.wraps(forward)
    def inside(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(device_type, dtype, enabled=dtype is not None):
            return forward(*args, **kwargs)

    return inside
