"""The micro-batches of a step, each on the device only when its turn comes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import overload

from data_pipeline.batch import Batch


class LazyBatches(Sequence[Batch]):
    """Micro-batches that are loaded each time they are looked at: accumulation is there to bound memory.

    Args:
        batches: on the host.
        load: brings one to the device.
    """

    def __init__(self, batches: Sequence[Batch], load: Callable[[Batch], Batch]) -> None:
        self._batches, self._load = batches, load

    def __len__(self) -> int:
        return len(self._batches)

    @overload
    def __getitem__(self, i: int) -> Batch: ...
    @overload
    def __getitem__(self, i: slice) -> list[Batch]: ...
    def __getitem__(self, i: int | slice) -> Batch | list[Batch]:
        if isinstance(i, slice):
            return [self._load(batch) for batch in self._batches[i]]
        return self._load(self._batches[i])
