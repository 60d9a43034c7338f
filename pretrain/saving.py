"""When to save: by steps, by minutes, and on demand; and when to stop on demand, which saves first."""

from __future__ import annotations

import time

from pretrain.checkpoint_writer import CheckpointWriter
from pretrain.collectives import World, greatest_of_ranks, side_group
from pretrain.demand import Asked, Demand
from pretrain.state import RunState


class TimedCheckpoints:
    """Saves every so many steps and minutes, and where it is demanded of any rank.

    Args:
        writer: saves a state; None: nothing is ever saved.
        world: this process among the ranks.
        demand: of this rank. A stop that any rank is asked for, all are.
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
        self.stopping = False

    def due(self, step: int) -> bool:
        """Whether to save after this step; every rank asks at every step, and all get the same answer.

        `stopping` then says whether to stop as well.
        """
        minutes = (time.monotonic() - self._last) / 60
        by_time = self._world.is_main and self._every_minutes is not None and minutes >= self._every_minutes
        asked = greatest_of_ranks(max(self._demand.asked, Asked.SAVE if by_time else Asked.NOTHING), self._group)
        self.stopping = asked == Asked.STOP
        return asked > Asked.NOTHING or (self._every_steps is not None and step % self._every_steps == 0)

    def save(self, state: RunState) -> None:
        self._demand.asked = Asked.NOTHING
        if self._writer is not None:
            self._writer.save(state)
        self._last = time.monotonic()
