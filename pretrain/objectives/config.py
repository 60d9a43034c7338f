"""What is trained for: a group of a recipe for each objective, in one union told apart by `kind`. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pretrain.models.config import TextTower
from pretrain.recipe.base import Group


class Supervised(Group):
    kind: Literal["supervised"]
    num_classes: int = Field(ge=2)
    loss: Literal["ce", "bce"] = "ce"  # cross entropy over classes, or a binary one for each class
    label_smoothing: float = Field(0.0, ge=0, lt=1)  # of soft labels too, a teacher's and mixed ones
    target_threshold: float | None = Field(None, ge=0, lt=1)  # bce: a smoothed target above it counts as 1, else as 0
    over_classes: Literal["mean", "sum"] = "mean"  # bce: of the losses of the classes
    dropout: float = Field(0.0, ge=0, lt=1)  # of the features before the classifier
    classifier_init: float = Field(0.02, gt=0)  # standard deviation of its weights at the start

    @model_validator(mode="after")
    def _binary(self) -> Supervised:
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


class Mae(Group):
    kind: Literal["mae"]
    mask_ratio: float = Field(0.75, gt=0, lt=1)
    decoder_width: int = Field(512, ge=1)
    decoder_depth: int = Field(8, ge=1)
    decoder_heads: int = Field(16, ge=1)
    normalize_target: bool = True

    @model_validator(mode="after")
    def _heads(self) -> Mae:
        if self.decoder_width % self.decoder_heads:
            raise ValueError(
                f"expected a decoder_width that decoder_heads {self.decoder_heads} divides, found {self.decoder_width}."
            )
        return self


class _ImageText(Group):
    """Images against their captions. The text tower is the model's own with model.library open_clip."""

    embed_dim: int | None = Field(None, ge=1)  # with model.library timm, and so is text
    text: TextTower | None = None
    tokenizer: str = "clip"  # CLIP's own, a file of merges in its form, or a folder with tokenizer.json
    # LiT: a tower keeps the weights it starts with; a number leaves so many of its last groups of layers unlocked.
    lock_image: bool | Annotated[int, Field(ge=1)] = False
    lock_text: bool | Annotated[int, Field(ge=1)] = False


class Clip(_ImageText):
    kind: Literal["clip"]
    initial_scale: float = Field(1 / 0.07, ge=1)  # factor of the cosines, never below 1
    max_scale: float = Field(100.0, ge=1)

    @model_validator(mode="after")
    def _scale(self) -> Clip:
        if self.initial_scale > self.max_scale:
            raise ValueError(f"expected an initial_scale up to max_scale {self.max_scale}, found {self.initial_scale}.")
        return self


class Siglip(_ImageText):
    kind: Literal["siglip"]
    initial_scale: float = Field(10.0, gt=0)
    initial_bias: float = -10.0


class Byol(Group):
    kind: Literal["byol"]
    hidden_width: int = Field(4096, ge=1)  # of projector and predictor
    out_width: int = Field(256, ge=1)
    base_decay: float = Field(0.996, ge=0, lt=1)  # of the target at the start; a half cosine raises it to 1


class SimSiam(Group):
    kind: Literal["simsiam"]
    projector_layers: int = Field(3, ge=1)
    projector_width: int = Field(2048, ge=1)  # of every layer, the last too
    predictor_width: int = Field(512, ge=1)  # of the hidden layer
    fixed_predictor_lr: bool = True  # the predictor's learning rate stays at its peak


class Simmim(Group):
    kind: Literal["simmim"]
    mask_ratio: float = Field(0.6, gt=0, lt=1)
    mask_patch: int = Field(32, ge=1)  # side of what is hidden at once, pixels; whatever the encoder's patches


# One objective; those of the union below that are no sum of others.
Single = Supervised | Mae | Simmim | Byol | SimSiam


class Term(Group):
    weight: float = Field(1.0, gt=0)  # of its loss in the sum
    objective: Single = Field(discriminator="kind")


class Sum(Group):
    """Several objectives over one encoder; each has its own heads, and its own forward pass of the encoder."""

    kind: Literal["sum"]
    terms: tuple[Term, ...] = Field(min_length=2)

    @model_validator(mode="after")
    def _told_apart(self) -> Sum:
        kinds = [term.objective.kind for term in self.terms]
        if len(set(kinds)) < len(kinds):
            raise ValueError(f"expected terms of different kinds, by which they are named, found {', '.join(kinds)}.")
        return self


ObjectiveConfig = Annotated[Single | Sum | Clip | Siglip, Field(discriminator="kind")]
