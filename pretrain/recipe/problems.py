"""What pydantic finds wrong with a recipe, in our words: path, expected, found, and the nearest known key."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from pretrain.recipe.schema import absent_paths, groups_in, kinds, member_of_kind, paths_at_hand, tag_of
from pretrain.recipe.strict_yaml import write_inline

_EXPECTED = {
    "bool_type": "true or false",
    "dict_type": "a map",
    "finite_number": "a finite number",
    "float_type": "a number",
    "greater_than": "more than {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "int_type": "a whole number",
    "less_than": "less than {lt:g}",
    "less_than_equal": "at most {le:g}",
    "literal_error": "{expected}",
    "missing": "a value",
    "model_attributes_type": "a map",
    "model_type": "a map",
    "none_required": "null",
    "string_pattern_mismatch": "text that matches {pattern}",
    "string_type": "text",
    "too_long": "a list of {max_length}",
    "too_short": "a list of at least {min_length}",
    "tuple_type": "a list",
    "union_tag_invalid": "one of {expected_tags}",
}


def explain(error: ValidationError, tree: dict[str, Any], root: type[BaseModel]) -> list[str]:
    """One sentence per wrong value of `tree`, which is what was validated as a `root` (lists in place of tuples)."""
    expected: dict[tuple[str, ...], list[str]] = {}
    sentences: list[tuple[tuple[str, ...], str]] = []
    for details in error.errors(include_url=False):
        path = _path(details, tree, root)
        if details["type"] == "extra_forbidden":
            sentences.append((path, _unknown(path, tree, root)))
        elif details["type"] == "value_error":
            sentences.append((path, details["msg"].removeprefix("Value error, ")))
        else:
            # The members of a union each say what they expected of the same value.
            if path not in expected:
                sentences.append((path, ""))
            expected.setdefault(path, []).append(_expected(details, path, tree, root))
    return [
        f"{'.'.join(path) or 'recipe'}: "
        + (text or f"expected {' or '.join(dict.fromkeys(expected[path]))}, found {_found(path, tree)}.")
        for path, text in sentences
    ]


def _path(details: ErrorDetails, tree: Any, root: type[BaseModel]) -> tuple[str, ...]:
    """The keys of the location, without the names of union members that pydantic puts among them."""
    path: list[str] = []
    node = tree
    for depth, part in enumerate(details["loc"]):
        inside = isinstance(node, list) and isinstance(part, int)
        if (isinstance(node, dict) and part in node) or (inside and part < len(node)):  # type: ignore[operator]
            node = node[part]
            path.append(str(part))
        elif details["type"] == "missing" and depth == len(details["loc"]) - 1:
            path.append(str(part))
    if details["type"].startswith("union_tag"):
        return (*path, tag_of(_members_at(path, tree, root)[0][0]))
    return tuple(path)


def _expected(details: ErrorDetails, path: tuple[str, ...], tree: dict[str, Any], root: type[BaseModel]) -> str:
    if details["type"] == "union_tag_not_found":
        members, _ = _members_at(path[:-1], tree, root)
        return f"one of {', '.join(repr(kind) for member in members for kind in kinds(member))}"
    template = _EXPECTED.get(details["type"])
    return template.format(**details.get("ctx", {})) if template else f"what is valid ({details['msg']})"


def _found(path: tuple[str, ...], tree: Any) -> str:
    node = tree
    for part in path:
        if isinstance(node, dict) and part in node:
            node = node[part]
        elif isinstance(node, list) and int(part) < len(node):
            node = node[int(part)]
        else:
            return "nothing"
    text = repr(node) if isinstance(node, str) else write_inline(node)
    return text if len(text) <= 60 else text[:57] + "..."


def _unknown(path: tuple[str, ...], tree: dict[str, Any], root: type[BaseModel]) -> str:
    """The nearest key at the same level if one is near, else in the groups that are given, of their kinds, else in one
    that is not; else all of this level.
    """
    *parents, key = path
    siblings = [".".join((*parents, name)) for name in member_of_kind(*_members_at(parents, tree, root)).model_fields]
    given = [name for name in paths_at_hand(root, tree) if name != ".".join(path)]
    for candidates, cutoff in ((siblings, 0.6), (given, 0.8), (list(absent_paths(root, tree)), 0.8)):
        if not candidates:
            continue
        likeness = {name: _likeness(key, name.rpartition(".")[2]) for name in candidates}
        best = max(likeness, key=likeness.__getitem__)
        if likeness[best] >= cutoff:
            return f"unknown key. Did you mean {best}?"
    return f"unknown key. Known here: {', '.join(name.rpartition('.')[2] for name in siblings)}."


def _likeness(given: str, known: str) -> float:
    """1 for equal names; a name that is a part of the other (`lr`, `base_lr`) is less than a slip."""
    given, known = given.lower().replace("-", "_"), known.lower()
    if given in known.split("_") or known in given.split("_"):
        return 0.85
    return SequenceMatcher(None, given, known).ratio()


def _members_at(path: Sequence[str], tree: Any, root: type[BaseModel]) -> tuple[list[type[BaseModel]], Any]:
    """The groups that could stand at `path`, several where there is a union, and what stands there."""
    members: list[type[BaseModel]] = [root]
    node = tree
    for part in path:
        if isinstance(node, list):
            node = node[int(part)]
        else:
            members = list(groups_in(member_of_kind(members, node).model_fields[part].annotation))
            node = node[part]
    return members, node
