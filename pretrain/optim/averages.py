"""Moving averages of weights: of a whole model, for evaluation, and of a momentum teacher. Both are one update."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pretrain.optim.config import Ema

_BINADE_BITS = 0x7F800000  # of an fp32 number: its sign and fraction cleared, what is left is the power of two below it
_GOLDEN = (5**0.5 - 1) / 2


@torch.no_grad()
def follow(averages: Sequence[Tensor], weights: Sequence[Tensor], decay: float, step: int) -> None:
    """average <- decay * average + (1 - decay) * weight, in place, rounded so that small updates are not lost.

    An update of less than half an fp32 step of the average would be rounded away each time: at decay 0.9999, all of
    what a norm's scale near 1 has moved, until it is 6e-4 apart. So the sum is dithered before it is rounded, by a
    fraction of a step that runs through Weyl's sequence of the golden ratio: of n updates of f steps each, n f are
    taken up, and where f changes, roundings cancel as random ones do. They are not of one sign.

    Elementwise and without a state, so that a rank averages what it keeps of the weights, whatever that is: no
    collective, and a resumed run rounds as the uninterrupted one. What equals its weight stays as it is.

    Args:
        averages: fp32 tensors; with decay 0.9999, bf16 would round nearly every update away.
        weights: the same number of fp32 tensors of the same shapes.
        decay: in [0, 1].
        step: number of the update, which the dither depends on.
    """
    if not averages:
        return
    if decay < 0.5:  # no update is small; the weight itself at 0
        torch._foreach_lerp_(list(averages), list(weights), 1 - decay)
        return
    updates = torch._foreach_sub(list(weights), list(averages))
    dither = torch._foreach_sign(updates)
    torch._foreach_mul_(dither, [a.view(torch.int32).bitwise_and(_BINADE_BITS).view(torch.float32) for a in averages])
    torch._foreach_mul_(updates, 1 - decay)
    torch._foreach_add_(updates, dither, alpha=((step * _GOLDEN) % 1 - 0.5) * 2**-23)
    torch._foreach_add_(list(averages), updates)


def decay_at(config: Ema, step: int) -> float:
    """Decay of the update that follows the `step`-th applied step, counted from 1.

    With warmup min(decay, (1 + step) / (10 + step)), so that the initial weights are soon forgotten, as TensorFlow's
    ExponentialMovingAverage does when it is given the number of updates.
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
        follow(self._averages, self._stepped, decay_at(self._config, step), step)

    def average_of(self, stepped: Tensor) -> Tensor | None:
        """The average of one of them, of the same layout; None of any other tensor."""
        return self._of.get(stepped)
