"""Recipes from YAML files and back: `extends`, overrides, and every problem at once, each with its path."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_pipeline.errors import RecipeError
from pretrain.recipe.recipe import Recipe
from pretrain.recipe.resolve import Resolved, identity
from pretrain.recipe.strict_yaml import StrictYamlError, read_yaml, write_yaml
from pretrain.recipe.typed import read_tree, validate_tree

MAX_PARENTS = 8


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Reads a recipe with its parents, applies `a.b=c` overrides in their order, and checks it.

    `extends: other.yaml` names one parent, relative to the file it stands in. Maps merge key by key, anything
    else replaces what the parent has. The value of an override is YAML; `evals.0.k=5` enters a list.

    Raises:
        RecipeError: with every problem found, each naming its path, what was expected and what was found.
    """
    tree, problems = _read_with_parents(Path(path), seen=())
    return recipe_of(tree, overrides, where=str(path), problems=problems)


def recipe_of(
    tree: dict[str, Any], overrides: list[str] | None = None, *, where: str, problems: list[str] | None = None
) -> Recipe:
    """The recipe in a map of groups, with overrides as `load_recipe` takes them; they are applied in place.

    Args:
        where: the recipe is from, for messages.
        problems: found before.

    Raises:
        RecipeError: with every problem found.
    """
    problems = problems or []
    for override in overrides or []:
        problems += _apply(tree, override)
    return validate_tree(tree, Recipe, where=where, problems=problems)


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


def _read_with_parents(path: Path, seen: tuple[Path, ...]) -> tuple[dict[str, Any], list[str]]:
    """The merged tree of a file and its parents, without `extends`, and the problems in them."""
    file = path.resolve()
    if file in seen or len(seen) > MAX_PARENTS:
        chain = " -> ".join(p.name for p in (*seen, file))
        raise RecipeError(str(path), [f"extends: expected a chain of parents that ends, found {chain}."])
    tree, problems = read_tree(path)
    if seen:
        problems = [f"{path}, {problem}" for problem in problems]
    parent = tree.pop("extends", None)
    if parent is None:
        return tree, problems
    if not isinstance(parent, str):
        raise RecipeError(str(path), [f"extends: expected the path of one parent, found {parent!r}."])
    base, base_problems = _read_with_parents(path.parent / parent, (*seen, file))
    return _merge(base, tree), base_problems + problems


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        inner = merged.get(key)
        both = isinstance(inner, dict) and isinstance(value, dict)
        merged[key] = _merge(inner, value) if both else value  # type: ignore[arg-type]
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
