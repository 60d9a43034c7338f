"""What a run's speed is measured against: FLOPs, the device's peak, memory."""

from __future__ import annotations

import resource
import time
from typing import Literal

import torch
from torch.utils.flop_counter import FlopCounterMode

from data_pipeline.batch import Batch, BatchSpec
from pretrain.objectives.contract import Objective
from pretrain.runtime.state import Progress


def flops_per_sample(objective: Objective) -> float:
    """Floating point operations of one forward and backward pass for one sample, counted by running it.

    Matrix products, convolutions and attention count, two operations a multiply-add; elementwise work does not.
    Leaves weights, buffers and the random state as they were.
    """
    device = next(objective.parameters()).device
    batch = blank_batch(objective.needs, 2).to(device)
    devices = [device] if device.type == "cuda" else []
    was_training = objective.training
    objective.eval()  # running statistics stay untouched
    with torch.random.fork_rng(devices=devices), FlopCounterMode(display=False) as counter:
        objective(batch, Progress(0, 1, 0)).loss.backward()
    objective.zero_grad(set_to_none=True)
    objective.train(was_training)
    return float(counter.get_total_flops()) / len(batch)


def blank_batch(spec: BatchSpec, size: int) -> Batch:
    """Makes a batch as a spec asks for it, all zeros; the first patches are the hidden ones."""
    masks, tokens = None, None
    if spec.tokens is not None:
        tokens = torch.zeros(size, spec.tokens.context_length, dtype=torch.int64)
    if spec.mask is not None:
        masks = (torch.arange(spec.mask.num_patches) < spec.mask.num_hidden).expand(size, -1)
    return Batch(
        keys=tuple(map(str, range(size))),
        views=tuple(torch.zeros(size, 3, spec.image_size, spec.image_size) for _ in range(spec.num_views)),
        labels=torch.zeros(size, dtype=torch.int64) if spec.num_classes is not None else None,
        tokens=tokens,
        masks=masks,
    )


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
        peak: FLOP/s of the device that count as all that it can do.

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
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.peak = peak_tflops * 1e12 if peak_tflops else measure_peak_flops(device, dtype)

    def __call__(self, images_per_second: float) -> dict[str, float]:
        return {
            "mfu": images_per_second * self._flops / (self.peak * self._world_size),
            "memory_bytes": float(peak_memory_bytes(self._device)),
        }
