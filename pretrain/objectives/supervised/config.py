"""What a recipe says of supervised classification. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from pretrain.objectives.config import ObjectiveConfig


class SupervisedConfig(ObjectiveConfig):
    """Classes, the loss over them, and what the head does in training."""

    kind: Literal["supervised"]
    num_classes: int = Field(ge=2)
    loss: Literal["ce", "bce"] = "ce"  # cross entropy over classes, or a binary one for each class
    label_smoothing: float = Field(0.0, ge=0, lt=1)  # of soft labels too, a teacher's and mixed ones
    target_threshold: float | None = Field(None, ge=0, lt=1)  # bce: a smoothed target above it counts as 1, else as 0
    over_classes: Literal["mean", "sum"] = "mean"  # bce: of the losses of the classes
    dropout: float = Field(0.0, ge=0, lt=1)  # of the features before the classifier
    classifier_init: float = Field(0.02, gt=0)  # standard deviation of its weights at the start

    @model_validator(mode="after")
    def _binary(self) -> SupervisedConfig:
        if self.loss == "ce" and (self.target_threshold is not None or self.over_classes == "sum"):
            key = "over_classes sum" if self.target_threshold is None else "target_threshold"
            raise ValueError(f"expected loss bce with {key}, found ce.")
        off = self.label_smoothing / self.num_classes
        if self.target_threshold is not None and not off <= self.target_threshold < 1 - self.label_smoothing + off:
            raise ValueError(
                "expected a target_threshold that tells the label of an image from its other classes, in "
                f"[{off:g}, {1 - self.label_smoothing + off:g}) with label_smoothing {self.label_smoothing}, "
                f"found {self.target_threshold}."
            )
        return self

    def labeling_problem(self) -> tuple[str, str] | None:
        """With a binary loss classes do not share one probability."""
        if self.loss == "ce":
            return None
        return "a run with objective.loss ce, whose classes share one probability", self.loss
