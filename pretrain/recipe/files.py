"""Recipes from YAML files and back: `extends`, overrides, and every problem at once, each with its path."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_pipeline.errors import RecipeError
from pretrain.recipe.home import expand_home
from pretrain.recipe.recipe import Recipe
from pretrain.recipe.renamed import rename_keys
from pretrain.recipe.resolve import Resolved, identity
from pretrain.recipe.strict_yaml import StrictYamlError, read_yaml, write_yaml
from pretrain.recipe.typed import read_tree, validate_tree

MAX_PARENTS = 8


def load_recipe(
    path: str | Path, overrides: list[str] | None = None, *, note: Callable[[str], None] | None = None
) -> Recipe:
    """Reads a recipe with its parents, applies `a.b=c` overrides in their order, and checks it.

    `extends: other.yaml` names one parent, relative to the file it stands in. Maps merge key by key, anything
    else replaces what the parent has. The value of an override is YAML; `evals.0.k=5` enters a list.

    Args:
        note: is called with a sentence for each key that is called otherwise today.

    Raises:
        RecipeError: with every problem found, each naming its path, what was expected and what was found.
    """
    found = _read_with_parents(Path(path), seen=())
    if note is not None:
        for text in found.notes:
            note(f"{path}: {text}")
    return make_recipe(found.tree, overrides, where=str(path), problems=found.problems, note=note)


@dataclass(frozen=True)
class _Read:
    """What was read from a file and its parents: today's keys, what is wrong with them, and what was renamed."""

    tree: dict[str, Any]
    problems: list[str]
    notes: list[str]


def make_recipe(
    tree: dict[str, Any],
    overrides: list[str] | None = None,
    *,
    where: str,
    problems: list[str] | None = None,
    note: Callable[[str], None] | None = None,
) -> Recipe:
    """The recipe in a map of groups, with overrides as `load_recipe` takes them; they are applied in place.

    Args:
        where: the recipe is from, for messages.
        problems: found before.
        note: is called with a sentence for each key that is called otherwise today.

    Raises:
        RecipeError: with every problem found.
    """
    problems = problems or []
    notes, twice = rename_keys(tree, Recipe)
    problems += twice
    for override in overrides or []:
        problems += _apply(tree, override)
        notes += [f"--set {text}" for text in rename_keys(tree, Recipe, prefer_former=True)[0]]
    for text in notes if note is not None else ():
        note(text)  # type: ignore[misc]
    return validate_tree(tree, Recipe, where=where, problems=problems)


def print_note(text: str) -> None:
    """Shows a note of `load_recipe` to whoever gave the recipe."""
    print(f"note: {text}", file=sys.stderr)


def dump(recipe: Recipe) -> str:
    """YAML with every value written out; `load_recipe` of it gives an equal recipe."""
    return write_yaml(recipe.model_dump(mode="json"))


def resolved_yaml(recipe: Recipe, resolved: Resolved) -> str:
    """The recipe with every value written out, what follows from it, and the identity of the run."""
    return write_yaml(
        {
            **recipe.model_dump(mode="json"),
            "resolved": asdict(resolved),
            "identity": identity(recipe),
        }
    )


def _read_with_parents(path: Path, seen: tuple[Path, ...]) -> _Read:
    """The merged tree of a file and its parents, without `extends`."""
    file = path.resolve()
    if file in seen or len(seen) > MAX_PARENTS:
        chain = " -> ".join(p.name for p in (*seen, file))
        raise RecipeError(str(path), [f"extends: expected a chain of parents that ends, found {chain}."])
    tree, problems = read_tree(path)
    notes, twice = rename_keys(tree, Recipe)  # in each file by itself, or a parent's key would not be replaced
    problems += twice
    if seen:
        problems = [f"{path}, {problem}" for problem in problems]
        notes = [f"{path}, {text}" for text in notes]
    parent = tree.pop("extends", None)
    if parent is None:
        return _Read(tree, problems, notes)
    if not isinstance(parent, str):
        raise RecipeError(str(path), [f"extends: expected the path of one parent, found {parent!r}."])
    base = _read_with_parents(path.parent / expand_home(parent), (*seen, file))
    return _Read(merge(base.tree, tree), base.problems + problems, base.notes + notes)


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Merges two maps key by key; what is no map in both is taken from `over`."""
    merged = dict(base)
    for key, value in over.items():
        inner = merged.get(key)
        both = isinstance(inner, dict) and isinstance(value, dict)
        merged[key] = merge(inner, value) if both else value  # type: ignore[arg-type]
    return merged


def _apply(tree: dict[str, Any], override: str) -> list[str]:
    """Sets one `a.b=c` in the tree, in place; what is wrong with it as problems."""
    path, equals, text = override.partition("=")
    parts = [part.strip() for part in path.split(".")]
    if not equals or not all(parts):
        return [f"--set {override}: expected KEY.KEY=VALUE, such as optim.base_lr=3e-4."]
    try:
        value, problems = read_yaml(text)
    except StrictYamlError as error:
        return [f"--set {override}: {error}."]
    node: Any = tree
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(node, list) and part.isdecimal() and int(part) < len(node):
            key: Any = int(part)
        elif isinstance(node, dict):
            key = part
        else:
            at = ".".join(parts[:depth])
            what = f"a list of {len(node)}" if isinstance(node, list) else "a single value"
            return [f"--set {override}: expected a group with the key {part!r} at {at}, found {what}."]
        if last:
            node[key] = value
        elif isinstance(node, dict) and node.get(key) is None:
            node[key] = {}
        node = node[key]
    return [f"--set {override}: {problem}" for problem in problems]
