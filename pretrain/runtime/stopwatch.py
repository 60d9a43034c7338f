"""Exclusive times of named parts of the work, on a CPU and on a GPU."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


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
        """Books the time of a `with` block under a name."""
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
