"""The groups that a group's fields are made of, out of their annotations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel


def groups_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """Every group in an annotation: several where it is a union of groups."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from groups_in(argument)


def member_of_kind(members: Sequence[type[BaseModel]], node: Mapping[str, Any]) -> type[BaseModel]:
    """The member of a union that a map says it is, by its tag; the first where it says none."""
    return next((member for member in members if node.get(tag_of(member)) in kinds(member)), members[0])


def tag_of(member: type[BaseModel]) -> str:
    """The key that tells the members of its union apart."""
    return "library" if "library" in member.model_fields else "kind"


def kinds(member: type[BaseModel]) -> tuple[Any, ...]:
    """The values of the tag that a member of a union stands for."""
    field = member.model_fields.get(tag_of(member))
    return get_args(field.annotation) if field is not None else ()


def all_paths(group: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every key of a group and of the groups within it, by dotted path."""
    for name, field in group.model_fields.items():
        yield prefix + name
        for inner in groups_in(field.annotation):
            yield from all_paths(inner, f"{prefix}{name}.")
