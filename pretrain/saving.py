"""When to save: by steps, by minutes, and on demand."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from pretrain.checkpoint_writer import CheckpointWriter
from pretrain.collectives import World, on_any_rank, side_group
from pretrain.state import RunState


class Demand:
    """Raised by a signal to any rank, at any time; answered at the next step."""

    def __init__(self) -> None:
        self.raised = False

    @contextmanager
    def by_signal(self, signum: signal.Signals = signal.SIGUSR1) -> Iterator[None]:
        """Listens for the duration of a run. Only the main thread can; elsewhere nobody could send one."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signum, self._raise)
        try:
            yield
        finally:
            signal.signal(signum, before)

    def _raise(self, signum: int, frame: FrameType | None) -> None:
        self.raised = True


class TimedCheckpoints:
    """Saves every so many steps and minutes, and where it is demanded of any rank.

    Args:
        writer: saves a state; None: nothing is ever saved.
        world: this process among the ranks.
        demand: of this rank.
        every_steps: None: not by steps.
        every_minutes: None: not by time, which is rank 0's.
    """

    def __init__(
        self,
        writer: CheckpointWriter | None,
        *,
        world: World,
        demand: Demand,
        every_steps: int | None,
        every_minutes: float | None,
    ) -> None:
        self._writer, self._world, self._demand = writer, world, demand
        self._every_steps, self._every_minutes = every_steps, every_minutes
        self._last = time.monotonic()
        self._group = side_group()  # a flag between hosts: over NCCL every step would wait for the GPU

    def due(self, step: int) -> bool:
        """Whether to save after this step; every rank asks at every step, and all get the same answer."""
        if self._every_steps is not None and step % self._every_steps == 0:
            return True
        minutes = (time.monotonic() - self._last) / 60
        by_time = self._world.is_main and self._every_minutes is not None and minutes >= self._every_minutes
        return on_any_rank(by_time or self._demand.raised, self._group)

    def save(self, state: RunState) -> None:
        self._demand.raised = False
        if self._writer is not None:
            self._writer.save(state)
        self._last = time.monotonic()
