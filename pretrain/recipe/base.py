"""What every group of a recipe is made of."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Union

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag


class Group(BaseModel):
    """Base of every group: frozen; an unknown key and a number that is not finite are errors.

    A validator says "expected ..., found ..."; the loader puts the path before it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def union_by_kind(members: Iterable[type[Group]], default: str | None = None) -> Any:
    """The annotation of a group that is one of `members`, which their `kind` tells apart.

    Args:
        members: groups whose `kind` is a literal.
        default: the kind of a group that does not name its own; None: it must.
    """
    if default is None:
        return Annotated[Union[tuple(members)], Field(discriminator="kind")]  # noqa: UP007  (not known beforehand)
    tagged = [Annotated[member, Tag(member.model_fields["kind"].annotation.__args__[0])] for member in members]  # type: ignore[union-attr]
    return Annotated[Union[tuple(tagged)], _kind_or(default)]  # noqa: UP007


def _kind_or(default: str) -> Discriminator:
    return Discriminator(lambda v: v.get("kind", default) if isinstance(v, dict) else getattr(v, "kind", default))


def ordered(interval: tuple[float, float]) -> tuple[float, float]:
    if interval[0] > interval[1]:
        raise ValueError(f"expected [smallest, largest], found {list(interval)}.")
    return interval


Share = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Probability = Annotated[float, Field(ge=0, le=1)]
