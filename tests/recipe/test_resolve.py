"""What follows from a recipe: sizes that multiply up, a schedule that is covered, an identity."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.errors import RecipeError
from data_pipeline.samples.config import Augmentation
from pretrain.recipe.files import dump, resolved_yaml
from pretrain.recipe.resolve import differences, identity, resolve
from pretrain.recipe.strict_yaml import read_yaml, write_yaml
from tests.recipe.recipes import SMALL, bounded, changed, load


@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 64), st.integers(1, 10**7), st.data())
@bounded
def test_sizes_multiply_up_and_the_schedule_is_covered(
    tmp_path: Path, world: int, micro: int, accumulation: int, num_samples: int, data: st.DataObject
) -> None:
    size = world * micro * accumulation
    length = data.draw(st.sampled_from([{"epochs": 3}, {"epochs": 0.1}, {"samples": 12345}, {"steps": 17}]))
    schedule = {**length, "warmup": data.draw(st.sampled_from([0, 0.05, 0.99]))}
    tree = {**SMALL, "batch": {"global_size": size, "micro_size": micro}, "schedule": schedule}
    resolved = resolve(load(tmp_path, tree), world, num_samples)
    assert (resolved.local_size, resolved.micro_size, resolved.accumulation) == (
        micro * accumulation,
        micro,
        accumulation,
    )
    assert resolved.steps_per_epoch * size == pytest.approx(num_samples)
    to_see = length.get("samples", length.get("epochs", 0) * num_samples)
    if "steps" in length:
        assert resolved.total_steps == 17
    else:
        assert resolved.total_steps * size >= to_see * (1 - 1e-8)
        assert resolved.total_steps == 1 or (resolved.total_steps - 1) * size < to_see
    assert resolved.warmup_steps < resolved.total_steps
    assert resolved.warmup_steps == pytest.approx(schedule["warmup"] * resolved.total_steps, abs=1)
    assert resolved.peak_lr == pytest.approx(1.5e-4 * size / 256)


def test_without_lr_batch_the_learning_rate_is_as_written(tmp_path: Path) -> None:
    recipe = load(tmp_path, changed("optim.lr_batch", None))
    assert resolve(recipe, 2, 1000).peak_lr == 1.5e-4


@given(st.integers(1, 5000), st.integers(1, 64), st.none() | st.integers(1, 200))
@bounded
def test_a_batch_that_does_not_divide_is_answered_with_sizes_that_work(
    tmp_path: Path, size: int, world: int, micro: int | None
) -> None:
    recipe = load(tmp_path, {**SMALL, "batch": {"global_size": size, "micro_size": micro}})
    try:
        resolve(recipe, world, 1000)
    except RecipeError as error:
        (problem,) = error.problems
        near = [[int(n) for n in re.findall(r"\d+", part)] for part in problem.split("Nearest: ")[1].split(",")]
        key = problem.split(":")[0]
        assert key == ("batch.global_size" if size % world else "batch.micro_size")
        assert near[0]
        for value in near[0]:
            fixed = {"global_size": size, "micro_size": None, key.split(".")[1]: value}
            resolve(load(tmp_path, {**SMALL, "batch": fixed}), world, 1000)
        for ranks in near[1] if len(near) > 1 else []:
            resolve(load(tmp_path, {**SMALL, "batch": {"global_size": size}}), ranks, 1000)
    else:
        assert size % world == 0
        assert size // world % (micro or 1) == 0


def leaves(tree: Any, path: str = "") -> list[str]:
    if not isinstance(tree, dict):
        return [path]
    return [leaf for key, inner in tree.items() for leaf in leaves(inner, f"{path}.{key}" if path else key)]


def test_the_identity_is_of_what_changes_results(tmp_path: Path) -> None:
    recipe = load(tmp_path, SMALL)
    backwards = {key: SMALL[key] for key in reversed(SMALL)}
    assert identity(load(tmp_path, backwards)) == identity(recipe)
    assert identity(load(tmp_path, dump(recipe))) == identity(recipe), "written-out defaults change nothing"
    same = {
        "name": "other",
        "data.train": "moved",
        "data.val": "moved",
        "data.max_bad_samples": 7,
        "batch.micro_size": 16,
        "runtime.threads": 3,
        "data.cache.folder": "/tmp/cache",
        "data.cache.max_gb": 7,
        "engine.zero_stage": 3,
        "logging.every_steps": 3,
        "checkpoint.keep_last": 9,
        "validation.every_epochs": 9,
        "evals": [],
    }
    for path, value in same.items():
        other = load(tmp_path, changed(path, value))
        assert identity(other) == identity(recipe), path
        assert differences(other, recipe) == []


def test_every_other_key_of_these_groups_changes_the_identity_and_is_named(tmp_path: Path) -> None:
    tree = changed("model.options", {"depth": 2})
    recipe = load(tmp_path, tree)
    full = recipe.model_dump(mode="json")
    excluded = {"data.train", "data.val", "data.max_bad_samples", "batch.micro_size"}
    paths = {
        path
        for group in ("seed", "data", "model", "objective", "optim", "schedule", "batch")
        for path in leaves(full[group], group)
        if not path.startswith("data.cache.")
    } - excluded
    other_values = {
        "model.image_size": 64,
        "model.eval_size": 64,
        "schedule.epochs": 4.0,
        "data.views.interpolation": "bilinear",
        "data.augment": [Augmentation(grayscale=0.2).model_dump()],
        "data.captions.field": "json",
        "data.captions.key": "texts",
        "data.captions.lines": True,
        "model.name": "vit_small_patch16_224",
        "data.views.crop": "square",
        "data.views.scale": [0.1, 0.5],
        "data.views.ratio": [0.5, 0.6],
        "data.views.eval_crop": 0.9,
        "objective.decoder_heads": 8,
        "objective.decoder_width": 256,
        "objective.normalize_target": False,
        "model.patch_size": 8,
        "schedule.warmup": 0.2,
        "optim.clip_norm": 1.0,
    }
    for path in sorted(paths):
        value: Any = full
        for part in path.split("."):
            value = value[part]
        if path.endswith((".kind", ".library")) or path in ("schedule.steps", "schedule.samples"):
            continue  # cannot be changed alone
        if path in other_values:
            new = other_values[path]
        elif isinstance(value, list):
            new = [0.5 * v for v in value]
        else:
            new = value + 1 if isinstance(value, int) else value / 2 or 0.5
        other = load(tmp_path, changed(path, new, tree))
        assert identity(other) != identity(recipe), path
        (difference,) = differences(other, recipe)
        assert difference == f"{path}: {json.dumps(new)} given, {json.dumps(value)} kept"


def test_a_run_of_another_objective_differs_in_every_key_it_has(tmp_path: Path) -> None:
    supervised = load(tmp_path, changed("objective", {"kind": "supervised", "num_classes": 3}))
    told = differences(supervised, load(tmp_path, SMALL))
    assert 'objective.kind: "supervised" given, "mae" kept' in told
    assert "objective.num_classes: 3 given, nothing kept" in told
    assert "objective.mask_ratio: nothing given, 0.75 kept" in told


def test_the_resolved_recipe_says_all_there_is(tmp_path: Path) -> None:
    recipe = load(tmp_path, SMALL)
    resolved = resolve(recipe, 2, 50_000)
    said, _ = read_yaml(resolved_yaml(recipe, resolved))
    assert said.pop("resolved") == vars(resolved)
    assert said.pop("identity") == identity(recipe)
    assert load(tmp_path, write_yaml(said)) == recipe


def test_the_average_of_weights_is_part_of_a_run_and_its_absence_is_not(tmp_path: Path) -> None:
    without = identity(load(tmp_path, SMALL))
    assert identity(load(tmp_path, changed("ema", None))) == without
    averaged = {identity(load(tmp_path, changed("ema", {"decay": decay}))) for decay in (0.99, 0.999)}
    assert len(averaged | {without}) == 3
