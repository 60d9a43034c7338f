"""Options that several commands have: said once, as the fields of a dataclass whose annotations are typer's."""

from __future__ import annotations

import inspect
from dataclasses import MISSING, Field, fields
from typing import Any, TypeVar, get_type_hints

T = TypeVar("T")


def group_of(group: type[T], given: dict[str, Any]) -> T:
    """The group made of the parameters of a command, which are taken out of `given`."""
    return group(**{field.name: given.pop(field.name) for field in fields(group)})  # type: ignore[arg-type]


def options_of(group: Any) -> list[inspect.Parameter]:
    """The parameters of a command that has the options of a group."""
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=_default(field),
            annotation=hints[field.name],
        )
        for field in fields(group)
    ]


def _default(field: Field[Any]) -> Any:
    if field.default_factory is not MISSING:
        return field.default_factory()
    return inspect.Parameter.empty if field.default is MISSING else field.default
