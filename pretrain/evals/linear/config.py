"""What may be chosen of a linear probe, and the presets of papers."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from pretrain.evals.classifiers.config import Rates, Training
from pretrain.evals.config import POOLING_HELP, ClassificationConfig, Count, Option, Pooling, WrongFieldsError
from pretrain.recipe.base import Positive

DINOV2_LEARNING_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)
INVERSE_PENALTIES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)

PRESETS: dict[str, dict[str, Any]] = {
    # arXiv:2111.06377, table 10 and sec. A.1, and its code's initial weights.
    "mae": {
        "solver": "lars",
        "learning_rates": (0.1,),
        "batch_size": 16384,
        "epochs": 90,
        "min_steps": 1,
        "warmup_epochs": 10,
        "batch_norm": True,
        "initial_std": 0.01,
        "augment": True,
    },
}
# Fields that the solver lbfgs would pass over in silence, and those that it needs alone.
_BY_STEPS = (
    "learning_rates", "weight_decays", "epochs", "warmup_epochs", "min_steps", "batch_size", "batch_norm",
    "initial_std", "augment",
)  # fmt: skip
_NOT_LBFGS = ("inverse_penalties",)

Several = Field(min_length=1)


class LinearConfig(ClassificationConfig):
    """The grid of a linear probe, and how each of its settings is trained.

    Learning rates are for a batch of 256, and scaled linearly with the batch; each weight decay, of the weights and
    never of the biases, goes with each of them. An inverse penalty is scikit-learn's C: of the sum of the losses,
    beside half the weights' square. Steps are those of so many epochs, but no fewer than `min_steps`. A share
    `val_share` of the training set is kept apart, to choose the setting on it. `seed` is of that split, of the order of
    samples, of their views and of initial weights.
    """

    summary = "Linear probe: a grid trained side by side, chosen on a split of the training set, tested once."
    title = "linear probe"
    examples = (
        "pretrain eval linear runs/mae --train shards/train --test shards/test",
        "pretrain eval linear runs/mae/checkpoints/step_00001000 --train shards/train --test shards/test",
    )
    found = frozenset({"learning_rate", "weight_decay", "val_top1"})

    kind: Literal["linear"] = "linear"
    solver: Annotated[
        Literal["sgd", "lars", "lbfgs"],
        Option("sgd (default), lars, or lbfgs: to the optimum, in fp64.", default=None),
    ] = "sgd"
    paper: Annotated[
        Literal["mae"] | None,
        Option("mae: batch norm, LARS, batch 16384, 90 epochs, augmented; the rest overrides."),
    ] = None
    learning_rates: Annotated[
        tuple[Positive, ...],
        Several,
        Option(
            "For a batch of 256; repeatable. Default: DINOv2's 13.", name="lr", parameter="learning_rate", default=None
        ),
    ] = DINOV2_LEARNING_RATES
    weight_decays: Annotated[
        tuple[Annotated[float, Field(ge=0)], ...],
        Several,
        Option(
            "Repeatable; each goes with each learning rate. Default: 0.",
            name="weight-decay", parameter="weight_decay", default=None,
        ),
    ] = (0.0,)  # fmt: skip
    inverse_penalties: Annotated[
        tuple[Positive, ...],
        Several,
        Option(
            "Of lbfgs, scikit-learn's C; repeatable. Default: 1e-5 to 1, by 10.",
            name="inverse-penalty", parameter="inverse_penalty", short="-C", default=None,
        ),
    ] = INVERSE_PENALTIES  # fmt: skip
    epochs: Annotated[int, Option("Default: 10.", default=None)] = Field(10, ge=0)
    warmup_epochs: Annotated[float, Option("Default: 0.", default=None)] = Field(0.0, ge=0)
    min_steps: Annotated[int, Option("Or the epochs, where they are more. Default: 5000.", default=None)] = Field(
        5000, ge=1
    )
    batch_size: Annotated[
        int,
        Option(
            "Samples of a step of the classifier. Default: 1024.",
            name="head-batch-size", parameter="head_batch_size", default=None,
        ),
    ] = Field(1024, ge=1)  # fmt: skip
    batch_norm: Annotated[bool, Option("Before the classifier. Default: fixed statistics.", default=None)] = False
    initial_std: Annotated[float, Option("Of the classifier's first weights. Default: 0.", default=None)] = Field(
        0.0, ge=0
    )
    augment: Annotated[bool, Option("Random crops and flips, through the encoder at every step.", default=None)] = False
    crop_scale: Annotated[tuple[float, float], Option("Area of these crops. Default: 0.08 1.", default=None)] = (
        0.08,
        1.0,
    )
    pooling: Annotated[
        Pooling | Annotated[tuple[Pooling, ...], Several],
        Option(f"{POOLING_HELP} Repeatable: the best is chosen."),
    ] = "own"
    blocks: Annotated[
        Count | Annotated[tuple[Count, ...], Several],
        Option("The last N blocks, side by side. Repeatable; each with each pooling."),
    ] = 1
    val_share: float = Field(0.1, gt=0, lt=1)
    seed: Annotated[int, Option(shared=True)] = Field(0, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, given: Any) -> Any:
        """What a paper's preset says stands where nothing was given."""
        if not isinstance(given, dict) or given.get("paper") not in PRESETS:
            return given
        if given.get("solver") == "lbfgs":
            raise WrongFieldsError(
                ["paper"], "options of the chosen solver", "solver lbfgs, for which they mean nothing",
                "Leave them out.",
            )  # fmt: skip
        return {**PRESETS[given["paper"]], **given}

    @model_validator(mode="after")
    def _go_together(self) -> LinearConfig:
        exact = self.solver == "lbfgs"
        idle = [name for name in (_BY_STEPS if exact else _NOT_LBFGS) if self._is_changed(name)]
        idle += ["crop_scale"] if not self.augment and self._is_changed("crop_scale") else []
        if idle:
            raise WrongFieldsError(
                idle, "options of the chosen solver", f"solver {self.solver}, for which they mean nothing",
                "Leave them out; --inverse-penalty goes with --solver lbfgs, --crop-scale with --augment.",
            )  # fmt: skip
        if not self.warmup_epochs < max(1, self.epochs):
            raise WrongFieldsError(["warmup_epochs"], f"less than the {self.epochs} epochs", str(self.warmup_epochs))
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise WrongFieldsError(["crop_scale"], "two shares of the area, the smaller first", str(self.crop_scale))
        return self

    def _is_changed(self, name: str) -> bool:
        """Whether a field says something else than it does where nothing is given."""
        return bool(getattr(self, name) != type(self).model_fields[name].default)

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
        """Returns how SGD and LARS train on so many samples."""
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
