"""The contract of an objective: a batch and the progress in, an fp32 loss out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

from torch import Tensor, nn

from data_pipeline.batch import Batch, BatchSpec
from pretrain.state import Progress


class LossOutput(NamedTuple):
    """What a forward pass gives back; a tuple, because it is in tuples that ZeRO 3 looks for tensors.

    Attributes:
        loss: fp32 scalar, the mean over the local B; the engine averages over micro-batches and ranks.
        metrics: named fp32 scalars, detached, also means over the local B.
    """

    loss: Tensor
    metrics: dict[str, Tensor] = {}  # noqa: RUF012  (never written to)


class Objective(nn.Module, ABC):
    """Knows neither the engine nor an evaluator, and never calls backward. Inheritance ends one below this.

    Attributes:
        needs: what a batch must hold; checked against the data before anything starts.
        encoder: the unmodified timm module that evaluation and export receive. A submodule of this name, so
            that its tensors are called `encoder.*` in every checkpoint, whatever the objective.
    """

    needs: BatchSpec
    encoder: nn.Module

    @abstractmethod
    def forward(self, batch: Batch, progress: Progress) -> LossOutput:
        """The loss of one micro-batch whose views are already normalised floats, [B, 3, H, W]."""

    def ema(self, progress: Progress) -> tuple[float, list[tuple[nn.Module, nn.Module]]]:
        """Decay and (target, online) modules of a momentum teacher; the engine applies it after each step."""
        return 0.0, []

    def undecayed(self) -> list[nn.Module]:
        """Modules whose learning rate stays at its peak after the warmup, whatever the schedule."""
        return []
