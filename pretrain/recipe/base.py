"""What every group of a recipe is made of: the base that it shares with the settings of the data pipeline."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Union

from pydantic import Discriminator, Field, Tag

from data_pipeline.settings import Group as Group
from data_pipeline.settings import LocalPath as LocalPath
from data_pipeline.settings import Positive as Positive
from data_pipeline.settings import Probability as Probability
from data_pipeline.settings import Share as Share
from data_pipeline.settings import ordered as ordered


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
