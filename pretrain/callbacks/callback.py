"""The hooks by which something happens beside the training steps."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from data_pipeline.batch import Batch
from pretrain.runtime.state import RunState


class Callback:
    """Something that happens beside the training steps; each hook does nothing unless it is overridden.

    Every rank has the same callbacks, and the loop calls each hook of all of them in their order on every rank, so that
    hooks may contain collectives (`on_batch` may not). No hook may change what is trained or its random state.
    """

    def on_batch(self, batch: Batch) -> None:
        """Sees a micro-batch on the device as the objective is about to get it."""

    def after_step(self, state: RunState, micro_batches: tuple[Batch, ...]) -> Mapping[str, Tensor]:
        """Follows every applied step, which `state` counts; `micro_batches` are this rank's, on the host.

        Returns:
            Scalars that are logged with the step's metrics where it is logged, the same names on all ranks.
        """
        return {}

    def on_log(self, values: Mapping[str, float]) -> None:
        """Sees the values of a logged step, which are the same on all ranks but for machine figures."""

    def is_due(self, step: int, last: bool) -> bool:
        """Whether `evaluate` is to follow the `step`-th applied step; `last`: it is the last of this process."""
        return False

    def evaluate(self, state: RunState) -> dict[str, float]:
        """Judges the state after a step that is due; returns values to log, the same on all ranks."""
        return {}


class Periodic(Callback):
    """A callback whose `evaluate` is due at every `every_steps`-th step and at the last one."""

    def __init__(self, every_steps: int) -> None:
        self._every_steps = every_steps

    def is_due(self, step: int, last: bool) -> bool:
        return last or step % self._every_steps == 0
