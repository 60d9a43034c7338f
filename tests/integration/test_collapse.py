"""A run whose embeddings collapse says so, in its log; one whose embeddings do not, does not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pretrain.callbacks.health import Debounced, collapse
from pretrain.models.encoders import build_encoder
from pretrain.recipe.recipe import Model
from tests.runs import train, write_recipe
from tests.shards import write_shards

MODEL = {"name": "test_resnet", "image_size": 16}


def test_a_collapsed_run_says_so(tmp_path: Path) -> None:
    """Forced: an encoder of zeros, whose features are those of every image, and no step that leads away from it."""
    state = build_encoder(Model(**MODEL)).state_dict()
    save_file({name: torch.zeros_like(value) for name, value in state.items()}, tmp_path / "zeros.safetensors")
    shards = write_shards(tmp_path / "shards")
    said = {}
    for start in ("zeros", "scratch"):
        recipe = write_recipe(
            tmp_path / f"{start}.yaml", shards, model=MODEL, optim={"base_lr": 1e-9}, schedule={"steps": 4},
            objective={"kind": "byol", "hidden_width": 16, "out_width": 8}, checkpoint={"every_steps": None},
            init_from=str(tmp_path / "zeros.safetensors") if start == "zeros" else None,
        )  # fmt: skip
        said[start] = train(recipe, tmp_path / start)
    assert said["zeros"].count("the embeddings collapse: embedding_std is 0.000") == 1
    assert "optim.base_lr" in said["zeros"]
    assert "the embeddings collapse" not in said["scratch"]


def test_it_is_said_when_it_lasts_and_of_a_term_too() -> None:
    watch = Debounced(collapse, lasting=3, again=5)
    low = {"byol/embedding_std": 0.05, "loss": 0.1}
    said = [watch(low) is not None for _ in range(12)]
    assert said == [False, False, True, False, False, False, False, True, False, False, False, False]
    assert collapse({"embedding_std": 0.1}) is None
    assert collapse({"loss": 0.0}) is None


@pytest.mark.parametrize("std", [0.0, 0.0999])
def test_it_is_said_with_its_value(std: float) -> None:
    assert f"{std:.3f}" in str(collapse({"embedding_std": std}))
