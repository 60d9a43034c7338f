"""YAML as recipes use it: maps, lists and the scalars of YAML 1.2; nothing that runs, repeats or hides.

What PyYAML would do otherwise: read `3e-4` as text, `no` as false and `1:30` as 90; keep the last of two
equal keys without a word; expand aliases into gigabytes.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

MAX_CHARS = 256 * 1024
MAX_DEPTH = 16

_NULL, _BOOL, _INT, _FLOAT = (f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float"))
# Per tag: what a plain scalar has to look like, and the characters it can begin with.
_SCALARS = (
    (_NULL, r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    (_BOOL, r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    (_INT, r"[-+]?[0-9]+(?:_[0-9]+)*", list("-+0123456789")),
    (
        _FLOAT,
        r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+0123456789."),
    ),
)
_RESOLVERS: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
for _tag, _pattern, _firsts in _SCALARS:
    for _first in _firsts:
        _RESOLVERS.setdefault(_first, []).append((_tag, re.compile(rf"(?:{_pattern})\Z")))


class StrictYamlError(Exception):
    """Text that is not YAML, or more of it than a recipe needs; the message is for the user."""


def read_yaml(text: str) -> tuple[Any, list[str]]:
    """The value that `text` holds, and a sentence for every key that stands twice or is not text.

    Raises:
        StrictYamlError: not YAML; too large or deep; tags, anchors, aliases, or several documents.
    """
    if len(text) > MAX_CHARS:
        raise StrictYamlError(f"expected at most {MAX_CHARS} characters, found {len(text)}")
    try:
        loader = _Loader(text)
        return loader.get_single_data(), loader.problems
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        said = " ".join(part for part in (error.context, error.problem) if part)
        raise StrictYamlError(f"{line}{said}") from None
    except yaml.YAMLError as error:
        raise StrictYamlError(" ".join(str(error).split())) from None


def write_yaml(value: Any) -> str:
    """Block style, keys in the order given; `read_yaml` gives back an equal value."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def write_inline(value: Any) -> str:
    """One value in one line, as it would stand in a recipe."""
    text = yaml.dump(value, Dumper=_Dumper, sort_keys=False, default_flow_style=True, width=float("inf"))
    return text.removesuffix("...\n").strip()


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = _RESOLVERS

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.problems: list[str] = []
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise yaml.MarkedYAMLError(
                problem="anchors and aliases are not for recipes; write the value out, or use `extends`",
                problem_mark=event.start_mark,
            )
        if getattr(event, "tag", None):
            raise yaml.MarkedYAMLError(
                problem=f"expected plain YAML, found the tag {event.tag!r}; remove it",
                problem_mark=event.start_mark,
            )
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem=f"nested deeper than {MAX_DEPTH} levels", problem_mark=event.start_mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        first_lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode) or key.tag != "tag:yaml.org,2002:str":
                raise yaml.MarkedYAMLError(
                    problem="expected text as a key; put it in quotes", problem_mark=key.start_mark
                )
            if key.value in first_lines:
                self.problems.append(
                    f"line {line}: expected each key once, found {key.value!r} again "
                    f"(first on line {first_lines[key.value]}). Remove one of them."
                )
            first_lines.setdefault(key.value, line)
        return super().construct_mapping(node, deep)

    def construct_integer(self, node: yaml.ScalarNode) -> int:
        try:
            return int(node.value)
        except ValueError:  # Python refuses to read thousands of digits
            raise yaml.MarkedYAMLError(
                problem="expected a number of fewer digits", problem_mark=node.start_mark
            ) from None


_Loader.add_constructor(_INT, _Loader.construct_integer)


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers = _RESOLVERS

    def ignore_aliases(self, data: Any) -> bool:
        return True
