"""Full-scale recipes against their papers' numbers: a wrong one costs GPU years before anybody sees it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from launch.chains.folder import ChainFolder
from pretrain.evals.finetune.recipe import preset_for
from pretrain.recipe.files import load_recipe, make_recipe
from pretrain.recipe.recipe import Recipe
from pretrain.recipe.resolve import resolve
from tests.contracts.published import MAE_FINETUNING, MAE_FINETUNING_BY_SIZE, PUBLISHED, USUAL, student
from tests.objectives.papers import CIFAR10, IMAGENET, PAIRS, Numbers

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
RECIPES = {path.stem: path for path in sorted((CONFIGS / "recipes").glob("*.yaml"))}

SAMPLES = {"data/imagenet1k/train": IMAGENET, "data/cifar10/train": CIFAR10, "data/pairs/train": PAIRS}

OFF = (None, False, 0, "")  # may be left out of an entry


def numbers(recipe: Recipe, num_samples: int) -> Numbers:
    """What a recipe comes to in a paper's terms: the peak learning rate, and epochs in place of shares of the run."""
    resolved, tree = resolve(recipe, 1, num_samples), recipe.model_dump()
    data, optim, schedule = tree["data"], tree["optim"], tree["schedule"]
    epochs = resolved.total_steps / resolved.steps_per_epoch
    return {
        "batch": resolved.global_size,
        "schedule": {
            **{key: schedule[key] for key in schedule.keys() - {"steps", "samples"}},
            "epochs": epochs,
            "warmup": schedule["warmup"] * epochs,
            "milestones": tuple(milestone * epochs for milestone in schedule.get("milestones", ())),
        },
        "optim": {**{key: optim[key] for key in optim.keys() - {"base_lr"}}, "peak_lr": resolved.peak_lr},
        **{key: data[key] for key in ("views", "augment", "mixing", "repeats", "mean", "std")},
        **{key: tree[key] for key in ("model", "objective", "ema")},
    }


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, tuple):
        value = {str(i): inner for i, inner in enumerate(value)}
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from leaves(inner, f"{path}.{key}" if path else key)
    else:
        yield path, value


def alike(path: str, found: Any, expected: Any) -> bool:
    """To the digit; of the schedule, up to what shares of a run, such as 0.0143 for 5 of 350 epochs, are rounded to."""
    if isinstance(found, float) and isinstance(expected, float | int):
        return math.isclose(found, expected, rel_tol=2e-3 if path.startswith("schedule.") else 1e-9)
    return bool(found == expected) or (found in OFF and expected in OFF)


def differences(found: Numbers, expected: Numbers) -> list[str]:
    """What a recipe has otherwise than its entry, of all that a recipe says."""
    ours, theirs, usual = dict(leaves(found)), dict(leaves(expected)), dict(leaves(USUAL))
    wanted = {path: theirs.get(path, usual.get(path)) for path in (*ours, *theirs)}
    return [
        f"{path}: expected {value}, found {ours.get(path)}"
        for path, value in wanted.items()
        if not alike(path, ours.get(path), value)
    ]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_has_the_numbers_of_its_paper(name: str) -> None:
    assert name in PUBLISHED, f"add what the paper of {name} says"
    recipe = load_recipe(RECIPES[name])
    assert isinstance(recipe.data.train, str)
    assert differences(numbers(recipe, SAMPLES[recipe.data.train]), PUBLISHED[name]) == []


def test_every_entry_has_a_recipe() -> None:
    assert PUBLISHED.keys() == RECIPES.keys()


def stage_of(chain: str, stage: str) -> Recipe:
    folder = ChainFolder.open(CONFIGS / "chains" / f"{chain}.yaml", None)
    return folder.recipe(folder.stage(stage))


@pytest.mark.parametrize(("stage", "ratio"), [("student1", 14), ("student2", 14), ("student3", 28)])
def test_noisy_students_count_by_their_labelled_images(stage: str, ratio: int) -> None:
    recipe = stage_of("noisy_student", stage)
    assert not isinstance(recipe.data.train, str)
    assert [source.weight for source in recipe.data.train] == [1, ratio]
    assert differences(numbers(recipe, IMAGENET * (1 + ratio)), student(ratio)) == []


def test_the_fine_tuning_of_mae_in_its_chain_is_the_authors() -> None:
    chain = numbers(stage_of("mae_pretraining", "supervised"), IMAGENET)
    assert differences(chain, MAE_FINETUNING) == []


@pytest.mark.parametrize("name", MAE_FINETUNING_BY_SIZE)
def test_the_preset_of_mae_s_fine_tuning_is_that_of_the_model_s_size(name: str) -> None:
    preset = preset_for("mae", name)
    tree = {
        **preset,
        "name": "preset",
        "data": {"train": "data/imagenet1k/train", **preset["data"]},
        "model": {"name": name, "image_size": 224, **preset["model"]},
        "objective": {"kind": "supervised", "num_classes": 1000, **preset["objective"]},
    }
    drop_path, epochs, base_lr, layer_decay = MAE_FINETUNING_BY_SIZE[name]
    # The pooling a chain cannot change.
    options = {"drop_path_rate": drop_path, "global_pool": "avg", "fc_norm": True}
    lr = base_lr * 1024 / 256
    wanted = MAE_FINETUNING | {
        "model": {"name": name, "image_size": 224, "options": options},
        "optim": MAE_FINETUNING["optim"] | {"peak_lr": lr, "layer_decay": layer_decay},
        "schedule": MAE_FINETUNING["schedule"] | {"epochs": epochs, "final_lr": 1e-6 / lr},
    }
    assert differences(numbers(make_recipe(tree, where="preset"), IMAGENET), wanted) == []
