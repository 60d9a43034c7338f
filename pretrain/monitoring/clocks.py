"""The clocks of the loop: one `phase` drives them all, and they say where the time between logged steps went."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from pretrain.runtime.stopwatch import Stopwatch

PARTS = ("copy", "forward", "backward", "reduce", "optimizer", "checkpoint", "evaluation")
Phase = str  # data, step, evaluation or checkpoint


class Clocks:
    """Measures the loop's phases, and the speed between logged steps, on this rank.

    Args:
        stopwatch: books what a step is made of, and each phase as a whole.
        listeners: called with the steps applied and the phase that begins; the watchdog's and the timeline's.
    """

    def __init__(self, stopwatch: Stopwatch, listeners: Sequence[Callable[[int, Phase], None]] = ()) -> None:
        self._stopwatch, self._listeners = stopwatch, tuple(listeners)
        stopwatch.take()  # what was booked while everything was made
        self._logged_at = time.perf_counter()
        self.restart()

    @contextmanager
    def phase(self, name: Phase, step: int) -> Iterator[None]:
        """A phase of the loop, for all clocks; every rank enters the same phases in the same order.

        Args:
            name: of the phase.
            step: steps applied so far.
        """
        for listener in self._listeners:
            listener(step, name)
        began = time.perf_counter()
        try:
            with self._stopwatch.part(name):
                yield
        finally:
            if name == "data":
                self._waited += time.perf_counter() - began

    def add(self, num_samples: int, host_seconds: Mapping[str, float]) -> None:
        """Counts a step.

        Args:
            num_samples: over all ranks.
            host_seconds: what making its data took, by part (read, decode, transform).
        """
        self._num_samples += num_samples
        for name, seconds in host_seconds.items():
            self._host_seconds[name] = self._host_seconds.get(name, 0.0) + seconds

    @property
    def images_per_second(self) -> float:
        """Samples per second over all ranks since `restart`."""
        return self._num_samples / self._seconds

    def shares(self) -> dict[str, Tensor]:
        """Shares of the time since `restart`: waiting for data, and what making that data took, per second, by part."""
        seconds = self._seconds
        values = {"data_wait": self._waited / seconds}
        values |= {f"data_{name}": spent / seconds for name, spent in self._host_seconds.items()}
        return {name: torch.tensor(value) for name, value in values.items()}

    def take_time_shares(self) -> dict[str, Tensor]:
        """Shares of the time since the last call, all of it counted: what went to each part of the work."""
        now = time.perf_counter()
        seconds, self._logged_at = max(now - self._logged_at, 1e-9), now
        taken = self._stopwatch.take()
        return {f"time_{part}": torch.tensor(taken.get(part, 0.0) / seconds) for part in PARTS}

    def restart(self) -> None:
        """Begins the next interval, which measures steps, not what came between them."""
        self._num_samples, self._waited = 0, 0.0
        self._host_seconds: dict[str, float] = {}
        self._began = time.perf_counter()

    @property
    def _seconds(self) -> float:
        return max(time.perf_counter() - self._began, 1e-9)
