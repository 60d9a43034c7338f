"""Repeated augmentation: every sample several times in a batch, each time drawn anew."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from data_pipeline.order.order import Integers, SampleOrder


class Repeated:
    """An order of which every position is taken R times: p is repeat `p % R` of position `p // R`.

    Hoffer et al. 2019 (arXiv:1901.09335); Berman et al. 2019 (arXiv:1902.05509). A step of B positions
    holds about B / R samples, and it takes R times as many positions to see all of them.

    What is drawn for a sample is drawn by its epoch, so each repeat counts as one: epoch `R e + r`. A step is sorted
    by repeat first: neighbors, which mixing makes pairs of, are then unlike samples.

    Args:
        order: of the samples.
        repeats: R.
    """

    def __init__(self, order: SampleOrder, repeats: int) -> None:
        self.order, self.repeats = order, repeats

    def step_positions(self, cursor: int, global_size: int, rank: int = 0, world_size: int = 1) -> Integers:
        positions = np.concatenate([self._of_repeat(r, cursor, global_size) for r in range(self.repeats)])
        local_size = global_size // world_size
        return positions[rank * local_size : (rank + 1) * local_size]

    def _of_repeat(self, repeat: int, cursor: int, global_size: int) -> Integers:
        """The step's positions p with p % R = repeat: a stretch of the order underneath, sorted as it sorts."""
        first, end = (-((repeat - p) // self.repeats) for p in (cursor, cursor + global_size))
        return self.order.step_positions(first, end - first) * self.repeats + repeat

    def locate(self, positions: Integers) -> Integers:
        return self.order.locate(positions // self.repeats)

    def epochs(self, positions: Integers) -> Integers:
        return self.order.epochs(positions // self.repeats) * self.repeats + positions % self.repeats

    def stand_ins(self, position: int) -> Iterator[int]:
        return self.order.stand_ins(position // self.repeats)
