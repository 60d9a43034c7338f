"""Where a step's time goes: exclusive times of named parts, and what to do where data is the brake."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from pretrain.monitoring.advice import Lasting

PARTS = ("copy", "forward", "backward", "reduce", "optimizer", "checkpoint", "evaluation")
_BRAKE = 0.15  # share of the time waited for data from which on it is worth a word


class Stopwatch:
    """Seconds spent in named parts; what an inner part takes, the outer does not.

    On CUDA parts are bounded by events on the current stream, so that measuring waits for nothing; they are read
    where the host has waited for the device anyway.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds: dict[str, float] = {}
        self._pending: list[tuple[str, str | None, torch.cuda.Event, torch.cuda.Event]] = []
        self._open: list[str] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        outer = self._open[-1] if self._open else None
        self._open.append(name)
        begun = self._now()
        try:
            yield
        finally:
            self._open.pop()
            self._book(name, outer, begun, self._now())

    def take(self) -> dict[str, float]:
        """Seconds by part since the last call."""
        if self._pending:
            torch.cuda.synchronize()
            for name, outer, begun, ended in self._pending:
                self._add(name, outer, begun.elapsed_time(ended) / 1000)
            self._pending = []
        taken, self._seconds = self._seconds, {}
        return {name: max(0.0, seconds) for name, seconds in taken.items()}  # below 0 where streams overlap

    def _now(self) -> float | torch.cuda.Event:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _book(
        self, name: str, outer: str | None, begun: float | torch.cuda.Event, ended: float | torch.cuda.Event
    ) -> None:
        if isinstance(begun, torch.cuda.Event) and isinstance(ended, torch.cuda.Event):
            self._pending.append((name, outer, begun, ended))
        elif isinstance(begun, float) and isinstance(ended, float):
            self._add(name, outer, ended - begun)

    def _add(self, name: str, outer: str | None, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds
        if outer is not None:
            self._seconds[outer] = self._seconds.get(outer, 0.0) - seconds


def data_brake(values: Mapping[str, float], num_workers: int, idle_cores: int) -> str | None:
    """A sentence where training waits for data: how much, what the time goes to, what would help; else None.

    Args:
        values: of a logged step: `data_wait`, and `data_read`, `data_decode`, `data_transform`, seconds per second.
        num_workers: loader processes of a rank.
        idle_cores: of this machine, that no rank's thread and no worker was given.
    """
    wait = values.get("data_wait", 0.0)
    parts = {name: values.get(f"data_{name}", 0.0) for name in ("read", "decode", "transform")}
    total = sum(parts.values())
    if wait < _BRAKE or total <= 0:
        return None
    shares = ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in parts.items())
    if parts["read"] > total / 2:
        help_ = "put the shards on faster storage, or raise runtime.num_workers so that reads overlap"
    elif idle_cores > 0:
        help_ = f"set runtime.num_workers={num_workers + idle_cores} (now {num_workers}; {idle_cores} cores are idle)"
    elif parts["decode"] > total / 2:
        help_ = "make the images smaller once (`pretrain data convert --short-side`): no core is idle"
    else:
        help_ = "take smaller views or bilinear interpolation (data.views), or add cores: none is idle"
    return f"data is the brake: {wait:.0%} of the time is waited for it ({shares}); {help_}"


class DataBrake(Lasting):
    def __init__(self, num_workers: int, idle_cores: int, *, lasting: int = 3, again: int = 200) -> None:
        super().__init__(lambda values: data_brake(values, num_workers, idle_cores), lasting=lasting, again=again)


@contextmanager
def profiled(steps: int | None, path: Path) -> Iterator[Callable[[], None]]:
    """Gives what to call after every step; writes a trace of `steps` of them, after two that warm up, to `path`.

    For chrome://tracing or Perfetto; None: nothing is traced.
    """
    if steps is None:
        yield lambda: None
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    plan = torch.profiler.schedule(wait=0, warmup=2, active=steps, repeat=1)
    with torch.profiler.profile(schedule=plan, on_trace_ready=lambda p: p.export_chrome_trace(str(path))) as profiler:
        yield profiler.step
