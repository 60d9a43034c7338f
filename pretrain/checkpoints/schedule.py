"""When to save: by steps, by minutes, and on request; and when to stop on request, which saves first.

Under a scheduler there is so long for that last save; whether it is enough is tried before the first step.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from data_pipeline.errors import InputError
from pretrain.checkpoints.writer import CheckpointWriter
from pretrain.runtime.collectives import World, greatest_of_ranks, side_group
from pretrain.runtime.signals import LEAD_SECONDS, Request, SignalRequests
from pretrain.runtime.state import RunState

_TRIAL_BYTES = 1 << 26


def check_time_to_save(checkpoint_bytes: int, out: Path, world: World) -> None:
    """Checks that a save is done between the warning and the time limit of a job.

    Every rank calls it, and writes its share of a checkpoint, or 64 MiB of it, at the same time as the others.

    Raises:
        InputError: by this trial, it would not be.
    """
    lead = os.environ.get(LEAD_SECONDS)
    if lead is None:
        return
    group = side_group()
    share = checkpoint_bytes // world.size
    greatest_of_ranks(0, group)  # all begin together
    seconds = min(_seconds_to_write(out / f".trial-{world.rank}.tmp", share) for _ in range(2))
    milliseconds = greatest_of_ranks(round(1000 * seconds), group)
    if milliseconds > 1000 * float(lead):
        raise InputError(
            where="signal_lead_seconds", expected=f"time for a save of {checkpoint_bytes / 1e9:.2f} GB, which takes "
            f"{milliseconds / 1000:.1f} s by a trial", found=lead,
            fix=f"Set signal_lead_seconds in the cluster file to {2 * milliseconds // 1000 + 30} or more, and "
            "time_minutes to more than that, or choose an --out on faster storage.",
        )  # fmt: skip


def _seconds_to_write(path: Path, num_bytes: int) -> float:
    """Estimates the time to write so many bytes from that of a part of them; the file is removed."""
    part = os.urandom(1 << 20)  # nothing that storage could shorten
    count = max(1, min(num_bytes, _TRIAL_BYTES) >> 20)
    path.parent.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    try:
        with path.open("wb") as file:
            for _ in range(count):
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        return (time.perf_counter() - began) * max(1.0, num_bytes / (count << 20))
    finally:
        path.unlink(missing_ok=True)


class CheckpointSchedule:
    """Saves every so many steps and minutes, and where it is requested of any rank.

    Attributes:
        stopping: whether a stop is requested: since the process began, then as of the last call of `due`.

    Args:
        writer: saves a state; None: nothing is ever saved.
        world: this process among the ranks.
        requests: signals to this rank. A stop that is requested of any rank is requested of all.
        every_steps: None: not by steps.
        every_minutes: None: not by time, which is rank 0's.
    """

    def __init__(
        self,
        writer: CheckpointWriter | None,
        *,
        world: World,
        requests: SignalRequests,
        every_steps: int | None,
        every_minutes: float | None,
    ) -> None:
        self._writer, self._world, self._requests = writer, world, requests
        self._every_steps, self._every_minutes = every_steps, every_minutes
        self._last = time.monotonic()
        self._group = side_group()  # a flag between hosts: over NCCL every step would wait for the GPU
        self.stopping = greatest_of_ranks(requests.take(), self._group) == Request.STOP

    def due(self, step: int) -> bool:
        """Whether to save after this step; every rank asks at every step, and all get the same answer.

        `stopping` then says whether to stop as well.
        """
        minutes = (time.monotonic() - self._last) / 60
        by_time = self._world.is_main and self._every_minutes is not None and minutes >= self._every_minutes
        request = greatest_of_ranks(
            max(self._requests.take(), Request.SAVE if by_time else Request.NOTHING), self._group
        )
        self.stopping = request == Request.STOP
        return request > Request.NOTHING or (self._every_steps is not None and step % self._every_steps == 0)

    def save(self, state: RunState) -> None:
        """Saves the state."""
        if self._writer is not None:
            self._writer.save(state)
        self._last = time.monotonic()
