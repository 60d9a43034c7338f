"""What every group of a recipe is made of."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class Group(BaseModel):
    """Base of every group: frozen; an unknown key and a number that is not finite are errors.

    A validator says "expected ..., found ..."; the loader puts the path before it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def ordered(interval: tuple[float, float]) -> tuple[float, float]:
    if interval[0] > interval[1]:
        raise ValueError(f"expected [smallest, largest], found {list(interval)}.")
    return interval


Share = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Probability = Annotated[float, Field(ge=0, le=1)]
