"""A run by the whole of "ResNet strikes back" A2 and more, small: every part acts, and it resumes to the bit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

from data_pipeline.datasets.read import open_dataset
from data_pipeline.loader import evaluation_batches
from pretrain.augment.augment import prepare
from pretrain.checkpoints.checkpoint import Tensors
from pretrain.objectives.kinds import build_objective
from pretrain.recipe.files import load_recipe
from pretrain.runtime.state import Progress
from tests.runs import losses, train, write_recipe
from tests.shards import write_shards

pytestmark = pytest.mark.slow

STEPS = 8


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    shards = write_shards(folder / "train")
    return write_recipe(
        folder / "recipe.yaml", shards,
        data={
            "train": str(shards), "val": str(shards), "read_streams": 3, "shuffle_window": 16, "repeats": 3,
            "augment": [{"rand_augment": {"magnitude": 7}, "erasing": {"probability": 0.5}}],
            "mixing": {"mixup": 0.1, "cutmix": 1.0},
        },
        model={"name": "test_resnet", "image_size": 32, "eval_size": 48, "options": {"drop_path_rate": 0.3}},
        objective={
            "kind": "supervised", "num_classes": 3, "loss": "bce", "label_smoothing": 0.1, "target_threshold": 0.2,
            "dropout": 0.3,
        },
        optim={"kind": "lamb", "base_lr": 5e-3, "lr_batch": None, "weight_decay": 0.02, "clip_norm": 1.0},
        schedule={"steps": STEPS, "warmup": 0.2},
        batch={"global_size": 16},
        ema={"decay": 0.9},
        engine={"zero_stage": 0, "precision": "fp32"},
        checkpoint={"every_steps": 4},
        validation={"every_epochs": 0.32},
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    train(recipe, out, 2)
    return out


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "encoder" / "model.safetensors")


def test_it_resumes_to_the_bit(recipe: Path, run: Path, tmp_path: Path) -> None:
    """Drop path, dropout and everything drawn for pixels are keyed by the step; the averages come back too."""
    out = tmp_path / "stopped"
    train(recipe, out, 2, max_steps=3)
    train(recipe, out, 2)
    assert losses(out) == losses(run)
    assert len(losses(run)) == STEPS
    for name, value in weights(run).items():
        assert torch.equal(weights(out)[name], value), name


@pytest.mark.parametrize(
    "change", ["model.options.drop_path_rate=0", "objective.dropout=0", "objective.target_threshold=null"]
)
def test_every_part_of_the_objective_acts(recipe: Path, run: Path, tmp_path: Path, change: str) -> None:
    """That those of the data do: test_augmented_run.py."""
    train(recipe, tmp_path / "without", 2, change, "data.val=null", max_steps=1)
    assert losses(tmp_path / "without")[1] != losses(run)[1]


def test_the_encoder_is_the_average(run: Path) -> None:
    encoder = timm.create_model(f"local-dir:{run / 'encoder'}", pretrained=True)
    kept = Tensors(max((run / "checkpoints").iterdir()))
    for name, value in encoder.named_parameters():
        assert torch.equal(value, kept.whole(f"ema/encoder.{name}"))
    assert not torch.equal(encoder.conv1[0].weight, kept.whole("param/encoder.conv1.0.weight"))
    assert encoder.pretrained_cfg["input_size"] == [3, 48, 48]


def test_it_is_validated_at_its_own_size(recipe: Path, run: Path) -> None:
    loaded = load_recipe(recipe)
    objective = build_objective(loaded.model, loaded.objective).eval()
    kept = Tensors(max((run / "checkpoints").iterdir()))
    whole = {name: kept.whole(name) for name in kept.shapes if name.startswith(("param/", "buffer/"))}
    objective.load_state_dict({name.partition("/")[2]: value for name, value in whole.items()})
    assert loaded.data.val is not None
    batches = evaluation_batches(
        open_dataset(loaded.data.val),
        replace(objective.needs, image_size=48),
        loaded.data.preprocessing(48),
        batch_size=100,
        max_pixels=10**6,
    )
    (batch,) = (prepare(b, torch.device("cpu"), loaded.data.mean, loaded.data.std, 3) for b in batches)
    expected = objective(batch, Progress(STEPS, STEPS, 0)).loss.item()
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == STEPS
    assert last["val/loss"] == pytest.approx(expected, rel=1e-5)
