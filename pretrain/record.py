"""What a run writes of itself before its first step: recipe, what follows from it, and what it runs on."""

from __future__ import annotations

import shutil
from pathlib import Path

from data_pipeline.durable import durable_file
from pretrain.preflight import Plan
from pretrain.recipe import Recipe
from pretrain.recipe_io import dump, load_recipe, resolved_yaml
from pretrain.resolve import is_longer
from pretrain.strict_yaml import read_yaml


def record_run(out: Path, recipe: Recipe, plan: Plan, environment: str) -> None:
    """Writes `environment.json`, `resolved.yaml` and `recipe.yaml`; rank 0 only."""
    out.mkdir(parents=True, exist_ok=True)
    _keep_the_shorter(out, recipe)
    resolved = f"{resolved_yaml(recipe, plan.resolved)}data_fingerprint: {plan.train.fingerprint}\n"
    # The recipe last: it is what makes the folder this run's.
    texts = {"environment.json": environment, "resolved.yaml": resolved, "recipe.yaml": dump(recipe)}
    for name, text in texts.items():
        with durable_file(out / name) as file:
            file.write(text.encode())


def _keep_the_shorter(out: Path, recipe: Recipe) -> None:
    """The recipe of a run that now goes on for longer, under another name."""
    given, resolved = out / "recipe.yaml", out / "resolved.yaml"
    if given.is_file() and resolved.is_file() and is_longer(recipe, load_recipe(given)):
        total_steps = read_yaml(resolved.read_text())[0]["resolved"]["total_steps"]
        shutil.copyfile(given, out / f"recipe-until-step-{total_steps:08d}.yaml")
