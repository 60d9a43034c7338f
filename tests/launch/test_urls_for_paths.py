"""A URL in the place of a path of this machine is refused by every command, before anything is made.

Every command is walked; so is every file of settings whose values are paths that are written to.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import pytest
import typer

from data_pipeline.errors import InputError
from data_pipeline.local_paths import url_scheme
from launch.cli import COMMANDS
from pretrain import __main__ as rank
from pretrain.recipe.files import load_recipe
from tests.commands import pretrain

URL = "s3://user:canary-password@bucket/canary-folder?signature=canary"
# Texts, by name: what is read from a URL or refused as it is read, and what names no file.
TEXTS = {
    "shards", "train", "test", "source", "teacher", "encoder", "towers", "tokenizer", "templates", "classes",
    "model", "option", "weights_key", "weights_prefix", "weights_ignore", "baseline", "group", "caption_field",
    "caption_key", "image_column", "caption_column", "label_column", "overrides",
}  # fmt: skip

OTHERS = {"kind": "digits"}  # what a required parameter is given that does not take `1`


def kinds_in(annotation: Any) -> set[Any]:
    """The plain types in an annotation, without what typer is told beside them."""
    inner = get_args(annotation)[:1] if get_origin(annotation) is Annotated else get_args(annotation)
    return set().union(*map(kinds_in, inner)) if inner else {annotation}


def commands() -> Iterator[tuple[str, Any, dict[str, set[Any]]]]:
    """Name, parsed form, and the types of the parameters of each command."""
    for name in COMMANDS:
        app = import_module(f"launch.commands.{name}").app
        group: Any = typer.main.get_command(app)
        for registered in app.registered_commands:
            own = registered.name or registered.callback.__name__
            seen = inspect.signature(registered.callback, eval_str=True).parameters.values()
            told = {parameter.name: kinds_in(parameter.annotation) for parameter in seen}
            inside = getattr(group, "commands", {})
            yield (f"{name} {own}", inside[own], told) if inside else (name, group, told)


def paths_of_commands() -> Iterator[tuple[str, Any, Any]]:
    """Each command with each of its parameters that is a path."""
    for name, command, told in commands():
        for parameter in command.params:
            if Path in told.get(parameter.name, ()):
                yield name, command, parameter


CASES = list(paths_of_commands())


def test_what_is_no_path_is_known_as_such() -> None:
    """A further text would be a path that nothing looks at, unless it is listed above."""
    for name, _, told in commands():
        texts = {parameter for parameter, kinds in told.items() if str in kinds}
        assert texts <= TEXTS, name
    without = {name for name, _, _ in commands()} - {name for name, _, _ in CASES}
    assert without == {"data verify"}, "commands that take no path"


@pytest.mark.parametrize(
    ("command", "parameter"), [case[1:] for case in CASES], ids=[f"{name}, {p.name}" for name, _, p in CASES]
)
def test_a_url_is_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Any, parameter: Any) -> None:
    monkeypatch.chdir(tmp_path)
    options: list[str] = []
    arguments: list[str] = []
    for each in command.params:
        value = URL if each is parameter else OTHERS.get(each.name, "1")
        if each.param_type_name == "argument":
            arguments.append(value)
        elif each is parameter or each.required:
            options += [each.opts[0], value]
    with pytest.raises(InputError, match=r"a path of this machine, found a URL \(s3://") as error:
        command.main([*options, "--", *arguments], standalone_mode=False)
    assert "canary" not in str(error.value)
    assert "bucket" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_command_that_is_given_a_url_makes_nothing(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("name: x")
    for words in (("train", "recipe.yaml", "--out", URL), ("data", "convert", "recipe.yaml", URL)):
        done = pretrain(*words, status=2, folder=tmp_path)
        assert "found a URL" in done.stderr
        assert "canary" not in done.stdout + done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_a_rank_takes_no_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        rank.main(["recipe.yaml", "--out", URL])
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert "--out: expected a path of this machine, found a URL (s3://" in said
    assert "canary" not in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key", ["data.cache.folder", "init_from", "resume_from", "data.train.0.labels"])
def test_a_path_in_a_recipe_is_no_url(key: str) -> None:
    recipe = Path(__file__).parents[2] / "configs/recipes/cpu/mae_cifar10.yaml"
    with pytest.raises(InputError, match=f"{re.escape(key)}: expected a path of this machine") as error:
        load_recipe(recipe, [f"data.train=[{{path: a, labels: '{URL}'}}]" if "labels" in key else f"{key}={URL}"])
    assert "canary" not in str(error.value)
    assert ": 1 problem\n" in str(error.value), "the list itself is right"


@pytest.mark.parametrize(
    ("text", "scheme"),
    [
        ("s3://bucket/x", "s3:"), ("s3:/bucket/x", "s3:"), (" https://host", "https:"), ("file:///x", "file:"),
        ("HTTP://host", "HTTP:"), ("host:/folder", "host:"), ("/mnt/s3://x", None), ("./s3:/x", None),
        ("runs/a:b", None), ("lr:3", None), ("~/x", None), ("C:/x", None),
    ],
)  # fmt: skip
def test_what_is_taken_for_a_url(text: str, scheme: str | None) -> None:
    assert url_scheme(text) == url_scheme(Path(text) if not text.startswith("./") else text) == scheme
