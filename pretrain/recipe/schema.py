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


def paths_at_hand(group: type[BaseModel], node: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Every key of a group, and of the groups given in its map, of the kinds given there, by dotted path."""
    for name, members in _fields(group):
        yield prefix + name
        inner = node.get(name)
        if members and isinstance(inner, Mapping):
            yield from paths_at_hand(member_of_kind(members, inner), inner, f"{prefix}{name}.")


def absent_paths(group: type[BaseModel], node: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The keys of groups that a map of this group could have and has not, where there is one kind of them."""
    for name, members in _fields(group):
        inner = node.get(name)
        if members and isinstance(inner, Mapping):
            yield from absent_paths(member_of_kind(members, inner), inner, f"{prefix}{name}.")
        elif len(members) == 1 and name not in node:
            yield from (f"{prefix}{name}.{key}" for key in members[0].model_fields)


def _fields(group: type[BaseModel]) -> Iterator[tuple[str, list[type[BaseModel]]]]:
    """Each field with the groups that it may hold."""
    for name, field in group.model_fields.items():
        yield name, list(groups_in(field.annotation))
