"""Keys of recipes that were called otherwise once: read, noted, and no other run for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import RecipeError
from pretrain.recipe.files import dump, load_recipe
from pretrain.recipe.recipe import Recipe
from pretrain.recipe.resolve import differences, identity
from tests.recipe.recipes import SMALL, changed, write

FORMER: dict[str, Any] = {"lanes": 3, "window": 5, "augment": [{"grey": 0.2, "solarise": 0.1}]}
TODAY: dict[str, Any] = {"read_streams": 3, "shuffle_window": 5, "augment": [{"grayscale": 0.2, "solarize": 0.1}]}
# Of the recipe SMALL with these values, computed when only the former keys were known.
IDENTITY = "0a0ab15f817e327abc46c98f13f33bd2229e5396982a9462ac7d3ef9f05ced45"


def loaded(folder: Path, data: dict[str, Any], overrides: list[str] | None = None) -> tuple[Recipe, list[str]]:
    """The recipe SMALL with these entries of `data`, and the notes on it without the path of the file."""
    tree = changed("data", {**SMALL["data"], **data})
    notes: list[str] = []
    path = write(folder, tree)
    return load_recipe(path, overrides, note=notes.append), [note.removeprefix(f"{path}: ") for note in notes]


def test_a_former_key_is_read_with_a_note_that_names_the_key_of_today(tmp_path: Path) -> None:
    former, notes = loaded(tmp_path, FORMER)
    today, none = loaded(tmp_path, TODAY)
    assert former == today
    assert none == []
    assert [note.split(" now;")[0] for note in notes] == [
        "data.lanes is called data.read_streams",
        "data.window is called data.shuffle_window",
        "data.augment.0.grey is called data.augment.0.grayscale",
        "data.augment.0.solarise is called data.augment.0.solarize",
    ]
    assert "read_streams: 3" in dump(former)
    assert "lanes" not in dump(former)


def test_a_run_stays_the_run_that_it_was(tmp_path: Path) -> None:
    former, _ = loaded(tmp_path, FORMER)
    assert identity(former) == IDENTITY
    other, _ = loaded(tmp_path, {**TODAY, "read_streams": 4})
    assert identity(other) != IDENTITY
    assert differences(other, former) == ["data.read_streams: 4 given, 3 kept"]


def test_either_name_replaces_what_a_parent_has_under_the_other(tmp_path: Path) -> None:
    for parent, child in (({"lanes": 3}, {"read_streams": 4}), ({"read_streams": 3}, {"lanes": 4})):
        write(tmp_path, changed("data", {**SMALL["data"], **parent}), "parent.yaml")
        path = write(tmp_path, {"extends": "parent.yaml", "data": child}, "child.yaml")
        assert load_recipe(path).data.read_streams == 4


def test_the_last_of_two_overrides_holds_whatever_the_key_is_called(tmp_path: Path) -> None:
    recipe, notes = loaded(tmp_path, TODAY, ["data.lanes=7", "data.augment.0.grey=0.5"])
    assert (recipe.data.read_streams, recipe.data.augment[0].grayscale) == (7, 0.5)
    assert [note.split(" is")[0] for note in notes] == ["--set data.lanes", "--set data.augment.0.grey"]
    assert loaded(tmp_path, TODAY, ["data.lanes=7", "data.read_streams=8"])[0].data.read_streams == 8


def test_both_names_in_one_file_are_a_problem(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        loaded(tmp_path, {"lanes": 3, "read_streams": 3})
    assert caught.value.problems == [
        "data.lanes: expected one of the two, found data.read_streams, its name of today, beside it."
    ]


@pytest.mark.parametrize("data", [3, ["x"], {"augment": 3}, {"augment": [3, {"grey": "x"}]}, {"lanes": None}])
def test_what_is_of_a_wrong_kind_is_left_to_the_validation(tmp_path: Path, data: Any) -> None:
    with pytest.raises(RecipeError, match=r"data"):
        load_recipe(write(tmp_path, changed("data", data)))
