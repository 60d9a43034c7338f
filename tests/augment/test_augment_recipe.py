"""What a recipe says about augmentation and mixing, and what is refused before anything starts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.batch import BatchSpec
from data_pipeline.errors import RecipeError
from data_pipeline.samples.config import Augmentation, Blur, Erasing, Jitter, Mixing, RandAugment
from pretrain.augment.augment import augmentations, mixing
from pretrain.recipe import recipe
from pretrain.recipe.resolve import identity
from pretrain.run import preflight
from tests.data_pipeline.tiny import write_shards
from tests.recipe.recipes import SMALL, changed

LABELS = BatchSpec(32, num_classes=3)


def config(**data: Any) -> recipe.Recipe:
    return recipe.Recipe.model_validate(changed("data", {"train": "shards"} | data))


def test_off_by_default() -> None:
    assert augmentations(config(), LABELS) == ()
    assert mixing(config(), LABELS, micro_size=3) is None


def test_groups_become_what_the_host_draws_from() -> None:
    byol = {
        "jitter": {"probability": 0.8, "brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1},
        "grayscale": 0.2,
        "blur": {"probability": 1.0},
    }
    second = {"rand_augment": {"magnitude": 7}, "solarize": 0.2, "erasing": {"probability": 0.25, "mode": "const"}}
    found = augmentations(config(augment=[byol, second]), replace(LABELS, num_views=2))
    assert found == (
        Augmentation(
            jitter=Jitter(probability=0.8, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1),
            grayscale=0.2,
            blur=Blur(probability=1.0, sigma=(0.1, 2.0)),
        ),
        Augmentation(
            rand_augment=RandAugment(magnitude=7), solarize=0.2, erasing=Erasing(probability=0.25, mode="const")
        ),
    )
    assert mixing(config(mixing={"mixup": 0.8}), LABELS, micro_size=4) == Mixing(
        mixup=0.8, cutmix=0.0, probability=1.0, switch_probability=0.5
    )


def test_one_entry_serves_all_views() -> None:
    found = augmentations(config(augment=[{"grayscale": 0.2}]), replace(LABELS, num_views=3))
    assert found == (Augmentation(grayscale=0.2),) * 3


@pytest.mark.parametrize(("num_views", "entries", "expected"), [(1, 2, "one entry"), (2, 3, "one entry, or 2")])
def test_another_number_of_entries_is_refused(num_views: int, entries: int, expected: str) -> None:
    with pytest.raises(RecipeError, match=rf"data\.augment: expected {expected}.*found {entries}"):
        augmentations(config(augment=[{}] * entries), replace(LABELS, num_views=num_views))


def test_mixing_without_labels_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"data\.mixing: expected an objective with labels to mix, found mae"):
        mixing(config(mixing={"cutmix": 1.0}), BatchSpec(32), micro_size=4)


def test_odd_micro_batches_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"batch\.micro_size: expected an even number.* found 3"):
        mixing(config(mixing={"cutmix": 1.0}), LABELS, micro_size=3)


def test_recipes_of_before_keep_their_identity() -> None:
    plain = recipe.Recipe.model_validate(SMALL)
    written_out = config(augment=[], mixing={"mixup": 0.0})
    assert identity(plain) == identity(written_out)
    assert identity(plain) != identity(config(augment=[{"grayscale": 0.2}]))


@pytest.mark.parametrize(
    ("objective", "data", "batch", "said"),
    [
        ({"kind": "mae"}, {"mixing": {"mixup": 0.8}}, {}, r"data\.mixing: expected an objective with labels"),
        ({"kind": "supervised", "num_classes": 3}, {"mixing": {"mixup": 0.8}}, {"micro_size": 1}, r"batch\.micro_size"),
        ({"kind": "supervised", "num_classes": 3}, {"augment": [{}, {}]}, {}, r"data\.augment: expected one entry"),
    ],
)
def test_it_is_refused_before_anything_starts(
    tmp_path: Path, objective: dict[str, Any], data: dict[str, Any], batch: dict[str, Any], said: str
) -> None:
    write_shards(tmp_path / "shards", [8])
    tree = changed("data", {"train": str(tmp_path / "shards"), **data})
    tree = changed("objective", objective, changed("batch", {"global_size": 8, **batch}, changed("evals", [], tree)))
    with pytest.raises(RecipeError, match=said):
        preflight(recipe.Recipe.model_validate(tree), 1, tmp_path / "run")
