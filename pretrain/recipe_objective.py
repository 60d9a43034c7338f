"""What is trained for: a group of a recipe for each objective, in one union told apart by `kind`. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pretrain.recipe_group import Group


class Supervised(Group):
    kind: Literal["supervised"]
    num_classes: int = Field(ge=2)
    label_smoothing: float = Field(0.0, ge=0, lt=1)


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


class Simmim(Group):
    kind: Literal["simmim"]
    mask_ratio: float = Field(0.6, gt=0, lt=1)
    mask_patch: int = Field(32, ge=1)  # side of what is hidden at once, pixels; whatever the encoder's patches


# One objective; those of the union below that are no sum of others.
Single = Supervised | Mae | Simmim


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


ObjectiveConfig = Annotated[Single | Sum, Field(discriminator="kind")]
