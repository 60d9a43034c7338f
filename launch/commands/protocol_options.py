"""From the fields of a protocol's group to the options of its command, and back. Imports no torch."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from enum import Enum, StrEnum
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

import annotated_types
import typer
from pydantic.fields import FieldInfo

from pretrain.evals.config import Option, ProtocolConfig, option_name


def parameters(config: type[ProtocolConfig]) -> list[inspect.Parameter]:
    """The parameters of the command, as typer reads them; options that all commands share are not among them."""
    return [_parameter(name, field, option) for name, (field, option) in config.options().items() if not option.shared]


def build_config(config: type[ProtocolConfig], given: dict[str, Any], shared: Mapping[str, Any]) -> ProtocolConfig:
    """The group of what was given, whose parameters are taken out of `given`.

    Args:
        config: the protocol's group.
        given: the parameters of the command.
        shared: values of options that all commands share.

    Raises:
        InputError: a value is wrong.
    """
    values: dict[str, Any] = {}
    for name, (field, option) in config.options().items():
        value = shared.get(name) if option.shared else given.pop(option.parameter or name)
        if isinstance(value, list | tuple):
            value = tuple(_plain(one) for one in value) or None
            if value is not None and len(value) == 1 and len(list(_members(field.annotation))) > 1:
                (value,) = value  # a field that may hold several has one by itself
        values[name] = _plain(value)
    return config.of_options(values)


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else value


def _parameter(name: str, field: FieldInfo, option: Option) -> inspect.Parameter:
    members = list(_members(field.annotation))
    several = [found for found in members if get_origin(found) is tuple]
    if several and Ellipsis in get_args(several[0]):
        kind: Any = list[_single(get_args(several[0])[0], name)]  # type: ignore[misc]
    elif several:
        kind = several[0]
    else:
        kind = _single(members[0], name)
    default = field.default if option.default is ... else option.default
    if field.is_required() and option.default is ...:
        default = inspect.Parameter.empty
    elif default is None:
        kind |= None
    elif get_origin(kind) is list:
        default = [_typed(one, get_args(kind)[0]) for one in (default if isinstance(default, tuple) else (default,))]
    else:
        default = _typed(default, kind)
    flag = f"--{option_name(name, option)}"
    flags = [f"{flag}/--no-{flag[2:]}" if kind == bool | None else flag, *([option.short] if option.short else [])]
    told = typer.Option(*flags, help=option.help, metavar=option.metavar or None, min=_least(field))
    return inspect.Parameter(
        option.parameter or name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, told]
    )


def _members(annotation: Any) -> Iterator[Any]:
    """The members of a union, None apart, without what is annotated."""
    if get_origin(annotation) is Annotated:
        yield from _members(get_args(annotation)[0])
    elif get_origin(annotation) in (tuple, Literal, None):
        if annotation not in (None, NoneType):
            yield annotation
    else:
        for member in get_args(annotation):
            yield from _members(member)


def _single(annotation: Any, name: str) -> Any:
    """The type of one value: a choice as an enumeration, for typer."""
    kind = next(_members(annotation))
    if get_origin(kind) is Literal:
        return StrEnum(name.title(), {value: value for value in get_args(kind)})
    return kind


def _typed(value: Any, kind: Any) -> Any:
    return kind(value) if inspect.isclass(kind) and issubclass(kind, Enum) else value


def _least(field: FieldInfo) -> float | None:
    """The least value that a field, or each of its values, may have."""
    return next((found for found in _bounds(field.metadata, field.annotation)), None)


def _bounds(metadata: Any, annotation: Any) -> Iterator[Any]:
    for one in metadata:
        if isinstance(one, annotated_types.Ge):
            yield one.ge
        elif isinstance(one, FieldInfo):
            yield from _bounds(one.metadata, None)
    if get_origin(annotation) is Annotated:
        inner, *more = get_args(annotation)
        yield from _bounds(more, inner)
    else:
        for member in get_args(annotation) if get_origin(annotation) is not Literal else ():
            yield from _bounds((), member)
