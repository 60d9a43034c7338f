"""Options that several commands have: said once, as the fields of a dataclass whose annotations are typer's."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, TypeVar, get_type_hints

T = TypeVar("T")


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Turns a command into what typer reads: each field of a dataclass among its parameters is an option of its own.

    Args:
        command: each parameter that is annotated with a dataclass is given one, made from the options of its fields.
    """
    groups: dict[str, Any] = {}
    seen: list[inspect.Parameter] = []
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        if is_dataclass(parameter.annotation):
            groups[parameter.name] = parameter.annotation
            seen += command_parameters(parameter.annotation)
        else:
            seen.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))

    @functools.wraps(command)
    def plain(**given: Any) -> None:
        built = {name: build_group(group, given) for name, group in groups.items()}
        command(**given, **built)

    del plain.__wrapped__  # or its signature would be looked up
    plain.__signature__ = inspect.Signature(seen)  # type: ignore[attr-defined]
    plain.__annotations__ = {option.name: option.annotation for option in seen}
    return plain


def build_group(group: type[T], given: dict[str, Any]) -> T:
    """Makes the group of the parameters of a command, which are taken out of `given`."""
    return group(**{field.name: given.pop(field.name) for field in fields(group)})  # type: ignore[arg-type]


def command_parameters(group: Any) -> list[inspect.Parameter]:
    """Returns the parameters of a command that has the options of a group."""
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
