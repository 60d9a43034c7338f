"""A suite small enough for a test: coloured images of three classes, and encoders without training."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import typer

from data_pipeline.errors import PretrainError
from launch.commands.eval import app
from launch.suites import run as suites
from launch.suites.jobs import Questions, SuiteJob, suite_jobs
from pretrain.evals.suite import load_suite
from pretrain.models.encoder_folders import save_encoder
from pretrain.models.encoders import build_encoder
from pretrain.recipe.files import dump
from pretrain.recipe.recipe import Recipe
from pretrain.recipe.strict_yaml import write_yaml
from tests.shards import write_images

GROUP: Any = typer.main.get_command(app)
COMMANDS = GROUP.commands
run_suite = partial(suites.run_suite, commands=COMMANDS)
submit_suite = partial(suites.submit_suite, commands=COMMANDS)

ENCODERS = ("first", "second")


def make_run(folder: Path, seed: int) -> Path:
    """A run's folder with an encoder of these weights."""
    recipe = Recipe.model_validate(
        {
            "name": folder.name,
            "seed": 5,
            "data": {"train": "shards"},
            "model": {
                "name": "vit_tiny_patch16_224",
                "image_size": 16,
                "patch_size": 8,
                "options": {"depth": 1, "embed_dim": 24, "num_heads": 2},
            },
            "objective": {"kind": "supervised", "num_classes": 3},
            "optim": {"base_lr": 1e-3},
            "schedule": {"steps": 10},
            "batch": {"global_size": 8},
        }
    )
    torch.manual_seed(seed)
    state, data = build_encoder(recipe.model).state_dict(), recipe.data
    save_encoder(folder / "encoder", state, recipe.model, data.preprocessing(recipe.model.judged_size))
    (folder / "recipe.yaml").write_text(dump(recipe))
    return folder


def tree_of(folder: Path) -> dict[str, Any]:
    """A suite of two encoders, a random one and two protocols, with its images and runs in `folder`."""
    write_images(folder / "train", 36)
    write_images(folder / "test", 24)
    runs = {name: str(make_run(folder / name, seed)) for seed, name in enumerate(ENCODERS)}
    return {
        "name": "small",
        "encoders": {**runs, "random": {"source": runs["first"], "random_init": True, "seed": 3}},
        "datasets": {"colours": {"train": str(folder / "train"), "test": str(folder / "test")}},
        "protocols": {
            "knn": {"kind": "knn", "k": [5, 3]},
            "linear": {"kind": "linear", "lr": [0.1], "min_steps": 20},
        },
    }


def write_suite(folder: Path, tree: dict[str, Any]) -> Path:
    path = folder / "suite.yaml"
    path.write_text(write_yaml(tree))
    return path


def in_this_process(cell: SuiteJob, device: str | None, say: Any) -> int:
    """A cell without the seconds that another process takes to begin."""
    try:
        status = app(list(cell.words[1:]), standalone_mode=False)
    except PretrainError as error:
        say(f"error: {error}")
        return error.exit_status
    return int(status or 0)


def cells(tmp_path: Path, tree: dict[str, Any]) -> list[SuiteJob]:
    return suite_jobs(load_suite(write_suite(tmp_path, tree)), tmp_path / "out", "suite.yaml", COMMANDS)


def with_option(tree: dict[str, Any], group: str, name: str, **options: Any) -> dict[str, Any]:
    given = tree[group][name]
    before = {"source": given} if isinstance(given, str) else given
    return {**tree, group: {**tree[group], name: {**before, **options}}}


def refused(cell: SuiteJob, device: str | None, say: Callable[[str], None]) -> int:
    raise AssertionError(f"{cell.name} was started")


def answered(folder: Path, tree: dict[str, Any]) -> bool:
    (cell,) = cells(folder, tree)
    return Questions().answered(cell)
