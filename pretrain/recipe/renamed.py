"""Keys that were once called otherwise stay readable, with a note that names the key of today.

A field says so by itself: its `serialization_alias` is its former key (data_pipeline/settings.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel

from pretrain.recipe.schema import groups_in, member_of_kind


def rename_keys(tree: Any, root: type[BaseModel], *, prefer_former: bool = False) -> tuple[list[str], list[str]]:
    """Puts today's keys in the place of former ones, in place.

    Args:
        tree: what was read from a file for a `root`; whatever in it is of a wrong kind is left to the validation.
        root: the group that the whole tree is of.
        prefer_former: of a key and its former name the latter holds, as it was just set by an override.

    Returns:
        A note for each former key, and a problem for each that stands beside the key of today.
    """
    notes: list[str] = []
    problems: list[str] = []

    def walk(node: Any, members: Sequence[type[BaseModel]], path: tuple[str, ...]) -> None:
        if isinstance(node, list):
            for number, inner in enumerate(node):
                walk(inner, members, (*path, str(number)))
            return
        if not isinstance(node, dict) or not members:
            return
        group = member_of_kind(members, node)
        for name, field in group.model_fields.items():
            former = field.serialization_alias
            if former is not None and former in node:
                old, new = ".".join((*path, former)), ".".join((*path, name))
                if name in node and not prefer_former:
                    problems.append(f"{old}: expected one of the two, found {new}, its name of today, beside it.")
                    del node[former]
                else:
                    notes.append(f"{old} is called {new} now; the former name is still read.")
                    _rename(node, former, name)
            if name in node:
                walk(node[name], list(groups_in(field.annotation)), (*path, name))

    walk(tree, [root], ())
    return notes, problems


def _rename(node: dict[str, Any], former: str, name: str) -> None:
    """Renames a key where it stands, so that the order of the keys stays what it was."""
    entries = [(name if key == former else key, value) for key, value in node.items() if key != name]
    node.clear()
    node.update(entries)
