"""What is wrong with a recipe's inputs is told at once, and before torch is loaded."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from data_pipeline.errors import InputError, RecipeError
from pretrain.inputs import refuse_wrong_inputs, trainable_names
from pretrain.models.encoders import _FAMILIES, _names
from tests.commands import begun
from tests.recipe.recipes import load
from tests.runs import MODEL
from tests.shards import write_shards

TREE = {
    "name": "tiny", "model": MODEL, "objective": {"kind": "supervised", "num_classes": 3},
    "optim": {"base_lr": 1e-2}, "schedule": {"steps": 4}, "batch": {"global_size": 8},
}  # fmt: skip


def wrong_in_five_ways(folder: Path) -> dict[str, object]:
    """A model that is not there, data without labels, and three data sets that are missing."""
    write_shards(folder / "unlabeled", 8, label=False)
    return {
        **TREE,
        "model": {**MODEL, "name": "vit_tinny_patch16_224"},
        "data": {"train": str(folder / "unlabeled"), "val": str(folder / "val")},
        "evals": [
            {"kind": "knn", "train": str(folder / "a"), "test": str(folder / "b")},
            {"kind": "knn", "train": str(folder / "unlabeled"), "test": str(folder / "unlabeled")},
        ],
    }


def test_all_of_it_is_told_at_once(tmp_path: Path) -> None:
    recipe = load(tmp_path, wrong_in_five_ways(tmp_path))
    with pytest.raises(RecipeError) as error:
        refuse_wrong_inputs(recipe)
    heads = ("model.name: ", "data.val: ", "data.train: label field", "evals.0.train: ", "evals.0.test: ")
    assert len(error.value.problems) == len(heads)
    for problem, head in zip(error.value.problems, heads, strict=True):
        assert problem.startswith(head)
    assert "Nearest: vit_tiny_patch16_224" in error.value.problems[0]


def test_one_alone_is_told_as_it_is(tmp_path: Path) -> None:
    recipe = load(tmp_path, {**TREE, "data": {"train": str(tmp_path / "none")}})
    with pytest.raises(InputError) as error:
        refuse_wrong_inputs(recipe)
    assert not isinstance(error.value, RecipeError)


def test_nothing_is_wrong_with_what_can_be_trained(tmp_path: Path) -> None:
    shards = str(write_shards(tmp_path / "train", 8))
    evals = [{"kind": "knn", "train": shards, "test": shards}]
    recipe = load(tmp_path, {**TREE, "data": {"train": shards, "val": shards}, "evals": evals})
    refuse_wrong_inputs(recipe)
    (tmp_path / "train" / "manifest.json").unlink()
    with pytest.raises(InputError):
        refuse_wrong_inputs(recipe)


def test_names_read_in_files_are_those_that_can_be_built() -> None:
    assert trainable_names() == frozenset().union(*map(_names, _FAMILIES))


def _without_torch(recipe: Path) -> None:
    """Trains where torch cannot be loaded."""
    from pretrain import __main__ as rank

    for name in [name for name in sys.modules if name.split(".")[0] in ("torch", "timm") or name == "pretrain.run"]:
        del sys.modules[name]
    sys.modules["torch"] = None  # type: ignore[assignment]
    sys.exit(rank.main([str(recipe)]))


def test_a_training_answers_without_torch(tmp_path: Path) -> None:
    from functools import partial

    from tests.recipe.recipes import write

    path = write(tmp_path, wrong_in_five_ways(tmp_path))
    with begun(partial(_without_torch, path), tmp_path) as command:
        done = command.wait()
    assert done.status == 2, done.stderr
    assert "tiny: 5 problems" in done.stderr
    assert "starting" not in done.stderr
