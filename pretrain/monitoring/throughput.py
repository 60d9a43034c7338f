"""What a run's speed is measured against: the FLOPs of a sample, the device's peak, memory."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pretrain.objectives.blank import blank_batch
from pretrain.objectives.contract import Objective
from pretrain.runtime.state import Progress


def flops_per_sample(objective: Objective) -> float:
    """Floating point operations of one forward and backward pass for one sample, counted by running it.

    Matrix products, convolutions and attention count, two operations a multiply-add; elementwise work does not, and
    of a contrastive loss not the products with the other samples. What is locked has no backward pass. What is done
    twice to save memory (recomputed blocks, fused attention's scores, a first pass over micro-batches) counts once: it
    is the model's work, whatever the engine makes of it. Leaves weights, buffers and the random state as they were.
    """
    device = next(objective.parameters()).device
    batch = blank_batch(objective.needs, 2).to(device)
    devices = [device] if device.type == "cuda" else []
    was_training = objective.training
    objective.eval()  # running statistics stay untouched
    with torch.random.fork_rng(devices=devices), _plain_attention(), FlopCounterMode(display=False) as counter:
        objective(batch, Progress(0, 1, 0)).loss.backward()
    objective.zero_grad(set_to_none=True)
    objective.train(was_training)
    return float(counter.get_total_flops()) / len(batch)


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Attention as matrix products: torch's fused one of `MultiheadAttention`, which it takes where nothing is trained,
    is not counted at all, and the backward pass of others as what it recomputes.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def measure_peak_flops(device: torch.device, dtype: torch.dtype, seconds: float = 0.5) -> float:
    """FLOP/s of the best of repeated square matrix products on this device, with the threads this rank has."""
    side = 8192 if device.type == "cuda" else 1024
    a, b = (
        torch.ones(side, side, device=device, dtype=dtype),
        torch.ones(side, side, device=device, dtype=dtype),
    )
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory this process has held: on the GPU where there is one, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Throughput:
    """What a number of samples per second means: MFU and memory.

    Attributes:
        peak: FLOP/s of the device that count as all that it can do: in bf16 the better of bf16 and fp32, as a device
            without instructions for bf16 is slower in it, and a run computes in part of it in fp32.

    Args:
        flops: of a sample, forward and backward.
        device: of this rank.
        world_size: ranks, all on such devices.
        precision: in which matrix products are computed.
        peak_tflops: of the device, as its maker states it; None: it is measured here once.
    """

    def __init__(
        self,
        flops: float,
        device: torch.device,
        world_size: int,
        precision: Literal["fp32", "bf16"],
        peak_tflops: float | None,
    ) -> None:
        self._flops, self._device, self._world_size = flops, device, world_size
        dtypes = (torch.float32, torch.bfloat16) if precision == "bf16" else (torch.float32,)
        self.peak = peak_tflops * 1e12 if peak_tflops else max(measure_peak_flops(device, dtype) for dtype in dtypes)

    def __call__(self, images_per_second: float) -> dict[str, float]:
        return {
            "mfu": images_per_second * self._flops / (self.peak * self._world_size),
            "memory_bytes": float(peak_memory_bytes(self._device)),
        }
