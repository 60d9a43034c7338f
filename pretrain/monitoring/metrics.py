"""Where a run's numbers go, and what they are measured against: FLOPs, the device's peak, memory."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TextIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.flop_counter import FlopCounterMode

from data_pipeline.batch import Batch, BatchSpec
from data_pipeline.messages import visible
from pretrain.monitoring.sinks import Sink
from pretrain.objectives.contract import Objective
from pretrain.runtime.state import Progress


class MetricLog:
    """Appends to `metrics.jsonl` and to its sinks, and shows progress; on every rank but 0 it does nothing.

    Args:
        folder: of the run. Lines of steps after `step`, which a resumed run takes again, are dropped.
        step: steps applied so far.
        total_steps: for the progress line.
        active: whether this rank writes.
        sinks: take the same numbers.
    """

    def __init__(self, folder: Path, *, step: int, total_steps: int, active: bool, sinks: Sequence[Sink] = ()) -> None:
        self._active, self._total_steps, self._started_at, self._first_step = (
            active,
            total_steps,
            time.monotonic(),
            step,
        )
        self._live = active and sys.stdout.isatty()
        self._sinks, self._failing = sinks, False
        if not active:
            return
        path = folder / "metrics.jsonl"
        _drop_after(path, step)
        self._file = path.open("a")
        self._text = (folder / "log-rank0.txt").open("a")

    def write(self, step: int, values: dict[str, float]) -> None:
        """Writes one line of `metrics.jsonl`; `values` by name, in the units their names say."""
        if not self._active:
            return
        self._append(self._file, json.dumps({"step": step, **values}))
        for sink in self._sinks:
            sink.write(step, values)

    def picture(self, step: int, name: str, pixels: NDArray[np.uint8]) -> None:
        """Gives an image [H, W, 3] to the sinks."""
        for sink in self._sinks:
            sink.picture(step, name, pixels)

    def progress(self, step: int, values: dict[str, float]) -> None:
        """Shows a logged step: on the live line of a terminal, as a plain line elsewhere."""
        done = step - self._first_step
        left = (time.monotonic() - self._started_at) / max(1, done) * (self._total_steps - step)
        shown = "  ".join(f"{name} {_shown(name, value)}" for name, value in values.items() if name in _SHOWN)
        line = f"step {step}/{self._total_steps}  {shown}  left {_duration(left)}"
        if self._live:
            width = os.get_terminal_size().columns
            sys.stdout.write("\r\x1b[2K" + line[: width - 1])
            sys.stdout.flush()
            self._log(line)
        else:
            self.say(line)

    def say(self, text: str) -> None:
        """Logs a line about what happens once: a checkpoint, an evaluation, a warning."""
        if not self._active:
            return
        text = visible(text, lines=True)
        print(("\r\x1b[2K" if self._live else "") + text, flush=True)
        self._log(text)

    def close(self) -> None:
        if not self._active:
            return
        if self._live:
            print(flush=True)
        self._file.close()
        self._text.close()
        for sink in self._sinks:
            sink.close()

    def _log(self, line: str) -> None:
        if self._active:
            self._append(self._text, line)

    def _append(self, file: TextIO, line: str) -> None:
        """A disk that is full costs lines of the log, not the run."""
        try:
            file.write(line + "\n")
            file.flush()
        except OSError as error:
            if not self._failing:
                print(f"{file.name}: {error.strerror}; the run goes on without", file=sys.stderr, flush=True)
            self._failing = True
        else:
            self._failing = False


_SHOWN = {
    "loss": ".4f",
    "top1": ".3f",
    "probe/top1": ".3f",
    "lr": ".2e",
    "grad_norm": ".3f",
    "images_per_second": ".0f",
    "data_wait": ".1%",
    "mfu": ".1%",
}


def _shown(name: str, value: float) -> str:
    return format(value, _SHOWN[name])


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _drop_after(path: Path, step: int) -> None:
    """A run that was killed has logged steps that its checkpoint does not know, the last line perhaps in part."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except ValueError:
            continue
    part = path.with_suffix(".part")
    part.write_text("".join(kept))
    part.replace(path)


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
