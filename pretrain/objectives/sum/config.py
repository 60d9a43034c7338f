"""What a recipe says of a sum of objectives: its terms, each of any kind that trains one encoder. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from pretrain.objectives.config import KINDS, ObjectiveConfig, config_class
from pretrain.recipe.base import Group, union_by_kind

if TYPE_CHECKING:
    TermConfig = ObjectiveConfig
else:
    TermConfig = union_by_kind(
        c for c in (config_class(kind) for kind in KINDS if kind != "sum") if not c.builds_encoder
    )


class Term(Group):
    """One objective of a sum."""

    weight: float = Field(1.0, gt=0)  # of its loss in the sum
    objective: TermConfig


class SumConfig(ObjectiveConfig):
    """Several objectives over one encoder; each has its own heads, and its own forward pass of the encoder."""

    kind: Literal["sum"]
    terms: tuple[Term, ...] = Field(min_length=2)

    @model_validator(mode="after")
    def _told_apart(self) -> SumConfig:
        kinds = [term.objective.kind for term in self.terms]
        if len(set(kinds)) < len(kinds):
            raise ValueError(f"expected terms of different kinds, by which they are named, found {', '.join(kinds)}.")
        return self
