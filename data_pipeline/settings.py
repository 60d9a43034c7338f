"""The base of every group of settings, and the bounds that several of them share. Imports no torch."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from data_pipeline.local_paths import path_text


class Group(BaseModel):
    """Base of every group of settings: frozen; an unknown key and a number that is not finite are errors.

    A validator says "expected ..., found ..."; whoever reads the file puts the path before it.

    A field whose key was once another one has that as its `serialization_alias`: it stays readable in files
    (pretrain/recipe/renamed.py), and it stays the key by which the identity of a run is computed.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def ordered(interval: tuple[float, float]) -> tuple[float, float]:
    """Validates that an interval does not fall."""
    if interval[0] > interval[1]:
        raise ValueError(f"expected [smallest, largest], found {list(interval)}.")
    return interval


Share = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Probability = Annotated[float, Field(ge=0, le=1)]
LocalPath = Annotated[str, AfterValidator(path_text)]  # anything but a URL
