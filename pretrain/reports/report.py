"""One page about a run: what came of it, how it went, what it sees. Self-contained, for a screen or a phone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from data_pipeline.datasets.dataset import Dataset
from data_pipeline.datasets.read import open_dataset
from data_pipeline.datasets.training import open_training
from data_pipeline.durable import durable_file, from_json
from data_pipeline.errors import CheckpointError, InputError
from pretrain.checkpoints.checkpoint import module_state, read_state
from pretrain.evals.encoder import Encoder
from pretrain.evals.sources.load import load_source
from pretrain.models.config import ModelConfig
from pretrain.models.strict_loading import load_strictly
from pretrain.monitoring.goodput import read_goodput
from pretrain.objectives.config import ImageTextConfig, ObjectiveConfig
from pretrain.objectives.contract import Objective
from pretrain.objectives.kinds import build_objective
from pretrain.objectives.masked import Painter, find_painter
from pretrain.recipe.files import load_recipe
from pretrain.recipe.recipe import Data, Recipe
from pretrain.reports.page import render as build_page
from pretrain.reports.reconstructions import draw_reconstructions
from pretrain.reports.report_figures import Picture, Series, curve
from pretrain.reports.run_facts import environment_rows, learned_from, load_environment, run_facts, shown_data
from pretrain.reports.run_results import curves_over_steps, find_protocol_results, kept_results, verdict
from pretrain.reports.sample_images import NeighborSample, neighbours
from pretrain.runtime.failure import read_failure
from pretrain.runtime.run_folder import newest_checkpoint

FILE_NAME = "report.html"
TEMPLATE = "report.html.j2"

NUM_RECONSTRUCTIONS, NUM_QUERIES, NUM_RATED, NUM_NEIGHBOURS, BANK_SIZE = 12, 6, 200, 10, 2000


def write_report(run: Path, *, notes: Sequence[str] = ()) -> Path:
    """Writes `report.html` into a run's folder, from what lies in it and from the run's data sets.

    Args:
        run: its folder; a complete checkpoint is needed.
        notes: how it went, a sentence each.

    Raises:
        InputError: no run, or a part of it or of its data is missing or damaged.
    """
    recipe = load_recipe(run / "recipe.yaml")
    checkpoint = newest_checkpoint(run)
    if checkpoint is None:
        raise CheckpointError(
            where=str(run / "checkpoints"),
            expected="a complete checkpoint",
            found="none",
            fix="Train the run, at least for a few steps.",
        )
    trained, environment = load_source(str(checkpoint)), load_environment(run / "environment.json")
    train = open_training(recipe.data.train, recipe.data.cache)
    val = open_dataset(recipe.data.val, recipe.data.cache) if recipe.data.val is not None else None
    objective = _objective(recipe.model, recipe.objective)
    painter = find_painter(objective)
    if painter is not None:
        load_strictly(objective, module_state(checkpoint), where=str(checkpoint))
    kept = kept_results(run / "evals", recipe.evals)
    results = find_protocol_results(kept, _judged_weights(recipe, checkpoint, trained))
    page = {
        "name": recipe.name,
        "verdict": verdict(results),
        "facts": run_facts(recipe, read_state(checkpoint).progress, checkpoint, environment, train, val),
        "comparisons": results,
        "notes": [*notes, f"The run failed: {why}"] if (why := read_failure(run)) is not None else notes,
        "goodput": read_goodput(run),
        "curves": _curves(_metrics(run / "metrics.jsonl")),
        "eval_curves": curves_over_steps(kept),
        "triples": draw_reconstructions(painter, val or train, recipe.data, NUM_RECONSTRUCTIONS) if painter else [],
        "shown_data": shown_data(train, val),
        "learned": learned_from(objective.needs, recipe.init_from),
        "mask_ratio": _hidden_share(painter),
        "normalized": painter is not None and painter.normalize_target,
        "neighbours": _neighbors(run, recipe.data, trained, train, val),
        "environment": environment_rows(environment),
        "packages": environment["packages"],
        "recipe": (run / "recipe.yaml").read_text("utf-8"),
    }
    with durable_file(run / FILE_NAME) as file:
        file.write(render(page).encode())
    return run / FILE_NAME


def render(page: dict[str, Any]) -> str:
    return build_page(TEMPLATE, page)


def _metrics(path: Path) -> list[dict[str, float]]:
    try:
        return [from_json(line) for line in path.read_text("utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise InputError(
            where=str(path), expected="the numbers of a run, a JSON object a line", found=str(error)
        ) from None


def _curves(metrics: Sequence[dict[str, float]]) -> list[Picture]:
    def series(key: str, name: str) -> Series:
        rows = [row for row in metrics if key in row]
        return name, [row["step"] for row in rows], [row[key] for row in rows]

    losses = [s for s in (series("loss", "training"), series("val/loss", "validation")) if s[1]]
    return [
        curve("loss", losses, from_zero=False),
        curve("learning rate", [series("lr", "lr")]),
        curve("images per second", [series("images_per_second", "images/s")]),
    ]


def _objective(model: ModelConfig, config: ObjectiveConfig) -> Objective:
    """An objective of the run's kind, with any weights."""
    with torch.random.fork_rng(devices=[]):
        return build_objective(model, config)


def _judged_weights(recipe: Recipe, checkpoint: Path, trained: Encoder) -> set[str]:
    """SHA-256 of what evaluations may have judged: the encoder, and both towers where the run trains two."""
    found = {trained.weights_sha256()}
    if isinstance(recipe.objective, ImageTextConfig):
        from pretrain.evals.sources.towers import load_towers  # open_clip alone takes seconds

        found.add(load_towers(str(checkpoint)).weights_sha256())
    return found


def _hidden_share(painter: Painter | None) -> float:
    mask = painter.needs.mask if painter is not None else None
    return mask.num_hidden / mask.num_patches if mask is not None else 0.0


def _neighbors(run: Path, data: Data, trained: Encoder, train: Dataset, val: Dataset | None) -> NeighborSample | None:
    """Nothing where no data is kept apart from training."""
    if val is None:
        return None
    return neighbours(
        {"trained": trained, "random start": load_source(str(run), random_init=True)},
        train,
        val,
        num_queries=NUM_QUERIES,
        num_rated=NUM_RATED,
        bank_size=BANK_SIZE,
        k=NUM_NEIGHBOURS,
        max_pixels=data.max_pixels,
    )
