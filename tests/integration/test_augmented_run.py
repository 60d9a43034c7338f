"""A run with all of augmentation on: its first loss is the objective's on the batch as its parts make it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from data_pipeline.loader import TrainLoader
from data_pipeline.samples.config import Views
from pretrain.augment.augment import augmentations, mixing, prepare
from pretrain.objectives.kinds import build_objective
from pretrain.recipe.files import load_recipe
from pretrain.run import preflight
from pretrain.runtime.state import Progress
from tests.runs import MODEL, losses, train, write_recipe
from tests.shards import write_shards

EVERYTHING = {
    "rand_augment": {},
    "jitter": {"probability": 0.8, "brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1},
    "grayscale": 0.2,
    "blur": {"probability": 0.5},
    "solarize": 0.2,
    "erasing": {"probability": 0.25},
}


def test_the_first_loss_is_that_of_the_augmented_batch(tmp_path: Path) -> None:
    """In micro-batches of a pair, against the whole batch in this process."""
    shards = write_shards(tmp_path / "data")
    path = write_recipe(
        tmp_path / "recipe.yaml", shards,
        model=MODEL,
        objective={"kind": "supervised", "num_classes": 3, "label_smoothing": 0.1},
        batch={"global_size": 16, "micro_size": 2},
        data={
            "train": str(shards), "read_streams": 3, "shuffle_window": 16, "repeats": 2,
            "augment": [EVERYTHING], "mixing": {"mixup": 0.8, "cutmix": 1.0},
        },
    )  # fmt: skip
    train(path, tmp_path / "run", max_steps=1)
    recipe = load_recipe(path)
    plan = preflight(recipe, 1, tmp_path / "none")
    loader = TrainLoader(
        plan.train, plan.needs, Views(), augmentations(recipe, plan.needs), mixing(recipe, plan.needs, 16),
        seed=0, read_streams=3, shuffle_window=16, repeats=2, global_size=16, micro_size=16, max_pixels=10**6,
    )  # fmt: skip
    (batch,) = next(loader.steps(0)).micro_batches
    torch.manual_seed(0)
    objective = build_objective(recipe.model, recipe.objective)
    prepared = prepare(batch, torch.device("cpu"), recipe.data.mean, recipe.data.std, 3)
    loss = float(objective(prepared, Progress(0, 1, 0)).loss.detach())
    assert losses(tmp_path / "run")[1] == pytest.approx(loss, rel=1e-5)
