"""What linear classifiers that are trained side by side have each for itself and in common. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple


class Rates(NamedTuple):
    """Learning rate (for a batch of 256) and weight decay (an L2 penalty, never on biases)."""

    learning_rate: float
    weight_decay: float


@dataclass(frozen=True)
class Training:
    """What all settings have in common.

    Attributes:
        num_steps: steps, over which a cosine takes the learning rates to zero.
        batch_size: samples of a step.
        seed: of the order of samples, and of the initial weights where they are random.
        warmup_steps: steps over which the learning rates rise linearly first.
        optimizer: SGD, or LARS (arXiv:1708.03888), which adapts the step of a setting's weights, not of its biases.
        batch_norm: features are normalized by the batch, in the end by running statistics (arXiv:2111.06377, sec. A.1);
            else by fixed statistics.
        initial_std: of the initial weights, normal and cut off at 2; 0: they are zero.
    """

    num_steps: int
    batch_size: int
    seed: int
    warmup_steps: int = 0
    optimizer: Literal["sgd", "lars"] = "sgd"
    batch_norm: bool = False
    initial_std: float = 0.0
