"""A run's folder: whose it is, and what a run writes of itself before its first step."""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import BinaryIO

from data_pipeline.durable import durable_file
from data_pipeline.errors import RunError
from pretrain.preflight import Plan
from pretrain.recipe.files import dump, load_recipe, resolved_yaml
from pretrain.recipe.recipe import Recipe
from pretrain.recipe.resolve import is_longer
from pretrain.recipe.strict_yaml import read_yaml
from pretrain.runtime.collectives import World, from_main
from pretrain.runtime.run_folder import LOCK


def claim(out: Path, world: World) -> BinaryIO | None:
    """The run's folder for this job alone, until what is returned is closed or rank 0 ends. Every rank calls it.

    Raises:
        RunError: another job has it; told alike on every rank.
    """
    lock: BinaryIO | None = None
    problem: RunError | None = None
    if world.is_main:
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / LOCK).open("ab")
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the process's own: forked workers do not keep it
        except OSError as error:
            problem = RunError(
                where=str(out), expected="one job at a time in a run's folder",
                found=f"another at work in it, or no locks there ({error.strerror})",
                fix="Wait for it or stop it, or choose another folder with --out.",
            )  # fmt: skip
    if (found := from_main(problem)) is not None:
        raise found
    return lock


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
        with durable_file(out / f"recipe-until-step-{total_steps:08d}.yaml") as file:
            file.write(given.read_bytes())
