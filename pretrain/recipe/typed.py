"""Typed files in YAML: recipes, cluster files, chains and suites are read, checked and refused in one way."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from data_pipeline.errors import RecipeError
from data_pipeline.url_secrets import EXPECTED, FIX, FOUND, hidden, holds_secrets
from pretrain.recipe.configs_folder import where_it_is
from pretrain.recipe.home import expand_tree
from pretrain.recipe.problems import explain
from pretrain.recipe.strict_yaml import StrictYamlError, read_yaml

M = TypeVar("M", bound=BaseModel)


def load_typed(
    path: Path,
    model: type[M],
    further: Callable[[M], Iterable[str]] = lambda loaded: (),
    *,
    shell: Collection[str] = (),
) -> M:
    """Reads a file as a model.

    Args:
        path: the file.
        model: the class that says what stands in the file.
        further: what is wrong with a file whose values are all valid one by one, a sentence for each problem.
        shell: keys of what a shell reads, such as the address of a proxy; a URL there may have a password in it.

    Raises:
        RecipeError: with every problem found, each naming its path, what was expected and what was found.
    """
    tree, problems = read_tree(path)
    return validate_tree(tree, model, where=str(path), problems=problems, further=further, shell=shell)


def validate_tree(
    tree: dict[str, Any],
    model: type[M],
    *,
    where: str,
    problems: Iterable[str] = (),
    further: Callable[[M], Iterable[str]] = lambda loaded: (),
    shell: Collection[str] = (),
) -> M:
    """Checks a map and returns it as a model.

    Args:
        tree: the map, with lists as YAML reads them; `~` in it is the home folder.
        model: the class that says what stands in the map.
        where: the map is from, for messages.
        problems: those that were found while the map was read.
        further, shell: as for `load_typed`.

    Raises:
        RecipeError: with every problem found.
    """
    secrets: list[str] = []
    found, tree = list(problems), _with_hidden(expand_tree(tree), secrets, shell)
    try:
        loaded = model.model_validate(as_tuples(tree), strict=True)
    except ValidationError as error:
        found += explain(error, tree, model)
    else:
        found += further(loaded)
    told = (f"{key}: expected {EXPECTED}, found {FOUND}. {FIX}" for key in secrets)
    found += [text for text in told if not any(wrong.startswith(text.partition(" ")[0]) for wrong in found)]
    if found:
        raise RecipeError(where, found)
    return loaded


def _with_hidden(value: Any, found: list[str], left: Collection[str] = (), at: str = "") -> Any:
    """Returns the value without the secrets of URLs, and adds to `found` at which dotted keys they were.

    Args:
        left: keys of the map whose values stay as they are.
    """
    if isinstance(value, dict):
        return {
            _with_hidden(key, found, at=at): inner if key in left else _with_hidden(inner, found, at=_dotted(at, key))
            for key, inner in value.items()
        }
    if isinstance(value, list | tuple):
        return type(value)(_with_hidden(inner, found, at=_dotted(at, str(i))) for i, inner in enumerate(value))
    if not isinstance(value, str) or not holds_secrets(value):
        return value
    found.append(at or "recipe")
    return hidden(value)


def _dotted(at: str, key: str) -> str:
    return f"{at}.{hidden(key)}" if at else hidden(key)


def read_tree(path: Path) -> tuple[dict[str, Any], list[str]]:
    """Reads the map in a YAML file, and lists what is wrong with its keys.

    Raises:
        RecipeError: the file is not there, or holds no map.
    """
    try:
        tree, problems = read_yaml(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        found = error.strerror if isinstance(error, OSError) else "bytes that are not UTF-8"
        raise RecipeError(str(path), [f"expected a file in YAML, found: {found}.{where_it_is(path)}"]) from None
    except StrictYamlError as error:
        raise RecipeError(str(path), [f"{error}."]) from None
    if not isinstance(tree, dict):
        raise RecipeError(str(path), [f"expected a map of groups, found {type(tree).__name__}."])
    return tree, problems


def as_tuples(value: Any) -> Any:
    """Turns lists into tuples: pydantic's strict mode, which keeps "true" from becoming 1.0, wants them so."""
    if isinstance(value, dict):
        return {key: as_tuples(inner) for key, inner in value.items()}
    return tuple(as_tuples(inner) for inner in value) if isinstance(value, list) else value
