"""What may be chosen of a linear probe, and the presets of papers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from data_pipeline.errors import InputError
from pretrain.evals.classifiers.heads import Rates, Training

DINOV2_LEARNING_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)
INVERSE_PENALTIES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)


@dataclass(frozen=True)
class LinearConfig:
    """The grid and how each of its settings is trained.

    Attributes:
        solver: sgd or lars, over `epochs`; lbfgs: to the optimum, in fp64.
        learning_rates: for a batch of 256; scaled linearly with the batch. DINOv2's 13 (arXiv:2304.07193).
        weight_decays: of the weights, never of the biases; each goes with each learning rate.
        inverse_penalties: scikit-learn's C, for lbfgs: of the sum of the losses, beside half the weights' square.
        batch_size: samples of a step; at most the training set, unless views are augmented.
        epochs, min_steps: steps are those of so many epochs, but no fewer than min_steps.
        warmup_epochs: over which learning rates rise first.
        batch_norm: features are normalised by batch norm without affine, not by fixed statistics.
        initial_std: of the initial weights; 0: they are zero.
        augment: random resized crops and flips, through the encoder at every step.
        crop_scale: least and greatest area of those crops, as a share of the image's.
        val_share: share of the training set on which the setting is chosen.
        seed: of that split, of the order of samples, of their views and of initial weights.
        max_train, max_test: the first samples only.
        paper: whose preset this was made of, for the report.
    """

    solver: Literal["sgd", "lars", "lbfgs"] = "sgd"
    learning_rates: tuple[float, ...] = DINOV2_LEARNING_RATES
    weight_decays: tuple[float, ...] = (0.0,)
    inverse_penalties: tuple[float, ...] = INVERSE_PENALTIES
    batch_size: int = 1024
    epochs: int = 10
    min_steps: int = 5000
    warmup_epochs: float = 0
    batch_norm: bool = False
    initial_std: float = 0.0
    augment: bool = False
    crop_scale: tuple[float, float] = (0.08, 1.0)
    val_share: float = 0.1
    seed: int = 0
    max_train: int | None = None
    max_test: int | None = None
    paper: str | None = None

    def __post_init__(self) -> None:
        low, high = self.crop_scale
        exact = self.solver == "lbfgs"
        checks = (
            ("learning_rates", _all(self.learning_rates, lambda lr: lr > 0), "finite numbers above 0"),
            ("weight_decays", _all(self.weight_decays, lambda wd: wd >= 0), "finite numbers of at least 0"),
            ("inverse_penalties", _all(self.inverse_penalties, lambda c: c > 0), "finite numbers above 0"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
            ("epochs", self.epochs >= 0, "at least 0"),
            ("min_steps", self.min_steps >= 1, "at least 1"),
            ("warmup_epochs", 0 <= self.warmup_epochs < max(1, self.epochs), f"less than the {self.epochs} epochs"),
            ("initial_std", self.initial_std >= 0, "at least 0"),
            ("crop_scale", 0 < low <= high <= 1, "two shares of the area, the smaller first"),
            ("val_share", 0 < self.val_share < 1, "a share between 0 and 1"),
            ("augment", not (exact and self.augment), "no augmentation with lbfgs, which needs features that stay"),
            ("batch_norm", not (exact and self.batch_norm), "no batch norm with lbfgs, which knows no batches"),
        )
        for field, holds, expected in checks:
            if not holds:
                raise InputError(where=f"linear.{field}", expected=expected, found=str(getattr(self, field)))

    @property
    def settings(self) -> tuple[Rates, ...]:
        """All pairs of a learning rate and a weight decay."""
        return tuple(Rates(lr, wd) for wd in self.weight_decays for lr in self.learning_rates)

    @property
    def described(self) -> tuple[dict[str, float], ...]:
        """The settings by the names of what they set."""
        if self.solver == "lbfgs":
            return tuple({"inverse_penalty": c} for c in self.inverse_penalties)
        return tuple(rates._asdict() for rates in self.settings)

    def num_steps(self, num_samples: int) -> int:
        per_epoch = num_samples / self.batch_size if self.augment else math.ceil(num_samples / self.batch_size)
        return max(self.min_steps, math.ceil(self.epochs * per_epoch))

    def training(self, num_samples: int) -> Training:
        """Of SGD and LARS, on so many samples."""
        assert self.solver != "lbfgs"
        num_steps = self.num_steps(num_samples)
        return Training(
            num_steps=num_steps,
            batch_size=self.batch_size if self.augment else min(self.batch_size, num_samples),
            seed=self.seed,
            warmup_steps=round(num_steps * self.warmup_epochs / max(1, self.epochs)),
            optimizer=self.solver,
            batch_norm=self.batch_norm,
            initial_std=self.initial_std,
        )


def _all(numbers: tuple[float, ...], holds: Callable[[float], bool]) -> bool:
    """Whether there is one, and each is finite and such."""
    return bool(numbers) and all(math.isfinite(number) and holds(number) for number in numbers)


# arXiv:2111.06377, table 10 and sec. A.1, and its code's initial weights.
MAE = LinearConfig(
    solver="lars",
    learning_rates=(0.1,),
    batch_size=16384,
    epochs=90,
    min_steps=1,
    warmup_epochs=10,
    batch_norm=True,
    initial_std=0.01,
    augment=True,
    paper="mae",
)
