"""Moving averages of weights: of a whole model, for evaluation, and of a momentum teacher. Both are one lerp."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pretrain.recipe_optim import Ema


@torch.no_grad()
def follow(averages: Sequence[Tensor], weights: Sequence[Tensor], decay: float) -> None:
    """average <- decay * average + (1 - decay) * weight, in place.

    Elementwise, so that a rank averages what it keeps of the weights, whatever that is: no collective. The tensors
    must be fp32; with decay 0.9999, bf16 would round every update away.
    """
    torch._foreach_lerp_(list(averages), list(weights), 1 - decay)


def decay_at(config: Ema, step: int) -> float:
    """Decay of the update that follows the `step`-th applied step, counted from 1.

    With warmup min(decay, (1 + step) / (10 + step)), so that the initial weights are soon forgotten, as TensorFlow's
    ExponentialMovingAverage does when it is told the number of updates.
    """
    return min(config.decay, (1 + step) / (10 + step)) if config.warmup else config.decay


class WeightEma:
    """Polyak averages of what an optimizer steps on this rank, in the same partitions (Polyak & Juditsky 1992).

    Args:
        config: decay and its warmup.
        stepped: the tensors that the optimizer steps; the averages start from what they hold.
    """

    def __init__(self, config: Ema, stepped: Sequence[Tensor]) -> None:
        self._config, self._stepped = config, list(stepped)
        self._averages = [tensor.detach().clone() for tensor in self._stepped]
        self._of = dict(zip(self._stepped, self._averages, strict=True))

    def update(self, step: int) -> None:
        """Call after the `step`-th applied step, counted from 1."""
        follow(self._averages, self._stepped, decay_at(self._config, step))

    def of(self, stepped: Tensor) -> Tensor | None:
        """The average of one of them, of the same layout; None of any other tensor."""
        return self._of.get(stepped)
