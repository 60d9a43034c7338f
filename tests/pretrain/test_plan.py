"""What a run is said to take against what it takes. Memory at each ZeRO stage: tests/drills/test_memory.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pretrain.callbacks.online_probe import OnlineProbe, ProbeShape, probe_bytes
from pretrain.objectives.kinds import build_objective
from pretrain.plan import Footprint, build_on_meta, footprint, model_state_bytes
from pretrain.recipe.files import load_recipe
from pretrain.recipe.recipe import Recipe
from pretrain.runtime.collectives import World
from tests.engine.test_engine import make_engine
from tests.ranks import run_ranks
from tests.runs import MODEL, write_recipe

RESNET: dict[str, Any] = {"name": "resnet18", "image_size": 32}
SUPERVISED: dict[str, Any] = {"kind": "supervised", "num_classes": 3}
CASES: dict[str, dict[str, Any]] = {
    "adamw": {},
    "adamw, average": {"ema": {"decay": 0.99}},
    "adamw, statistics": {"model": RESNET, "objective": SUPERVISED, "ema": {"decay": 0.99}},
    "momentum, teacher": {"objective": {"kind": "byol"}, "optim": {"kind": "sgd", "base_lr": 1e-2}},
    "momentum, probe": {"optim": {"kind": "sgd", "base_lr": 1e-2}, "online_probe": {}},
    "momentum, probe without norm": {
        "optim": {"kind": "sgd", "base_lr": 1e-2},
        "online_probe": {"batch_norm": False},
    },
    "no momentum": {"objective": SUPERVISED, "optim": {"kind": "sgd", "base_lr": 1e-2, "momentum": 0.0}},
    "lars": {
        "objective": SUPERVISED,
        "optim": {"kind": "lars", "base_lr": 1e-2},
        "engine": {"zero_stage": 0, "precision": "fp32"},
    },
}


PROBE = ProbeShape(width=32, num_classes=3)


def make_recipe(case: str, folder: Path) -> Recipe:
    return load_recipe(write_recipe(folder / "recipe.yaml", "shards", **{"model": MODEL, **CASES[case]}))


def planned(recipe: Recipe, world_size: int, probe: ProbeShape | None = None) -> Footprint:
    num_bytes = 0 if probe is None or recipe.online_probe is None else probe_bytes(recipe.online_probe, probe)
    objective = build_on_meta(recipe.model, recipe.objective)
    groups = (recipe.optim, recipe.engine, recipe.ema)
    return footprint(objective, *groups, world_size=world_size, probe_bytes=num_bytes)


def saved_bytes(world: World, recipes: dict[str, Recipe]) -> dict[str, int]:
    """Of all tensors that a checkpoint of one rank holds."""
    found = {}
    for case, recipe in recipes.items():
        objective = build_objective(recipe.model, recipe.objective)
        engine = make_engine(world, recipe.engine.zero_stage, objective=objective, optim=recipe.optim, ema=recipe.ema)
        probe = () if recipe.online_probe is None else OnlineProbe(recipe.online_probe, PROBE, engine).fragments()
        found[case] = sum(fragment.data.nbytes for fragment in (*engine.state.fragments(), *probe))
    return found


@pytest.mark.slow
def test_a_checkpoint_is_as_large_as_planned(tmp_path: Path) -> None:
    recipes = {case: make_recipe(case, tmp_path) for case in CASES}
    (found,) = run_ranks(saved_bytes, 1, recipes)
    assert {case: planned(recipe, 4, PROBE).checkpoint for case, recipe in recipes.items()} == found


def test_what_a_rank_keeps(tmp_path: Path) -> None:
    plain = planned(make_recipe("adamw", tmp_path), 2)
    assert plain.device == pytest.approx(model_state_bytes(plain.num_trained, 2, 2) + 4 * plain.num_frozen, rel=0.01)
    assert plain.host == plain.checkpoint / 2
    averaged = planned(make_recipe("adamw, average", tmp_path), 2)
    assert averaged.device - plain.device == pytest.approx(4 * plain.num_trained / 2, rel=0.01)
    taught = planned(make_recipe("momentum, teacher", tmp_path), 2)
    states = model_state_bytes(taught.num_trained, 2, 2, moments=1)
    assert taught.num_frozen > 0
    assert taught.device == pytest.approx(states + 4 * taught.num_frozen, rel=0.01)


def test_a_probe_is_kept_by_every_rank(tmp_path: Path) -> None:
    recipe = make_recipe("momentum, probe", tmp_path)
    assert recipe.online_probe is not None
    probe = probe_bytes(recipe.online_probe, PROBE)
    assert planned(recipe, 2, PROBE).device - planned(recipe, 2).device == probe


def test_what_is_offloaded_moves_to_the_host(tmp_path: Path) -> None:
    recipe = make_recipe("adamw", tmp_path)
    before = planned(recipe, 2)
    engine = recipe.engine.model_copy(update={"offload_optimizer": True})
    after = planned(recipe.model_copy(update={"engine": engine}), 2)
    moved = 4 * before.num_trained * 3 / 2  # master and two moments, of half the parameters
    assert (before.device - after.device, after.host - before.host) == (moved, moved)
