"""`~` is the home folder wherever a path stands."""

from __future__ import annotations

from pathlib import Path

import pytest

from pretrain.recipe.files import load_recipe
from pretrain.recipe.home import expand_tree, expand_words
from tests.commands import pretrain
from tests.recipe.recipes import changed, write


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_the_words_of_a_command(home: Path) -> None:
    given = ["--out=~/x", "~/y", "--out", "~", "--set", "a=~/z", "~x", "x~/y", "--out=~x/y", "a\n~/b"]
    found = [f"--out={home}/x", f"{home}/y", "--out", str(home), *given[4:]]
    assert expand_words(given) == found


def test_texts_at_any_depth(home: Path) -> None:
    tree = {"a": "~/x", "b": [{"c": "~"}, "x/~", 3, None], "~/k": ("~/t",)}
    assert expand_tree(tree) == {"a": f"{home}/x", "b": [{"c": str(home)}, "x/~", 3, None], "~/k": (f"{home}/t",)}


def test_a_recipe_its_parent_and_an_override(home: Path, tmp_path: Path) -> None:
    home.mkdir()
    write(home, changed("init_from", "~/weights")).rename(home / "base.yaml")
    recipe = tmp_path / "r.yaml"
    recipe.write_text("extends: ~/base.yaml\ndata: {val: ~/val}\n")
    loaded = load_recipe(recipe, ["data.train=~/train"])
    assert (loaded.data.train, loaded.data.val) == (f"{home}/train", f"{home}/val")
    assert loaded.init_from == f"{home}/weights"


def test_a_command_writes_into_the_home_folder(home: Path, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    pretrain("data", "make", "digits", "~/made", "--samples=4", "--workers=1", folder=tmp_path / "here")
    assert (home / "made" / "manifest.json").is_file()
    assert not list((tmp_path / "here").iterdir())
