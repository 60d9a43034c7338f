"""One page about a run: what came of it, how it went, what it sees. Self-contained, for a screen or a phone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data_pipeline.datasets.read import open_dataset
from data_pipeline.datasets.training import open_training
from data_pipeline.durable import durable_file
from data_pipeline.errors import CheckpointError, InputError
from pretrain.checkpoints.checkpoint import module_state, read_state
from pretrain.evals.config import KINDS, config_class
from pretrain.evals.encoder import Encoder
from pretrain.evals.result import EvalReport
from pretrain.evals.sources.load import load_source
from pretrain.evals.uncertainty import Interval
from pretrain.models.config import ModelConfig
from pretrain.models.strict_loading import load_strictly
from pretrain.monitoring.goodput import read_goodput
from pretrain.objectives.config import ObjectiveConfig
from pretrain.objectives.kinds import build_objective
from pretrain.objectives.masked import Painter, find_painter
from pretrain.recipe.files import load_recipe
from pretrain.recipe.recipe import Data
from pretrain.reports.comparison import difference
from pretrain.reports.page import render as build_page
from pretrain.reports.reconstructions import draw_reconstructions
from pretrain.reports.report_figures import Neighbors, Picture, Series, curve
from pretrain.reports.sample_images import neighbours
from pretrain.runtime.run_folder import newest_checkpoint

FILE_NAME = "report.html"
TEMPLATE = "report.html.j2"

NUM_RECONSTRUCTIONS, NUM_QUERIES, NUM_NEIGHBOURS, BANK_SIZE = 12, 6, 10, 2000


@dataclass(frozen=True)
class ProtocolResult:
    """What one protocol says of the trained encoder, and of the same one before training, where it was asked."""

    protocol: str
    trained: EvalReport
    random: EvalReport | None
    interval: Interval | None


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
    progress = read_state(checkpoint).progress
    trained = load_source(str(checkpoint))
    painter = _painter(recipe.model, recipe.objective, checkpoint)
    comparisons = find_protocol_results(run / "evals", trained.weights_sha256())
    page = {
        "name": recipe.name,
        "summary": f"{recipe.objective.kind} on {recipe.model.name}, {progress.samples_seen:,} samples seen in "
        f"{progress.step:,} of {progress.total_steps:,} steps of {recipe.batch.global_size:,}; the checkpoint is "
        f"{checkpoint.name}.",
        "comparisons": comparisons,
        "num_classes": comparisons[0].trained.data["num_classes"] if comparisons else None,
        "notes": notes,
        "goodput": read_goodput(run),
        "curves": _curves(_metrics(run / "metrics.jsonl")),
        "triples": _reconstructions(recipe.data, painter) if painter is not None else [],
        "mask_ratio": _hidden_share(painter),
        "normalized": painter is not None and painter.normalize_target,
        "neighbours": _neighbors(run, recipe.data, trained),
        "environment": _environment(run / "environment.json"),
        "recipe": (run / "recipe.yaml").read_text("utf-8"),
    }
    with durable_file(run / FILE_NAME) as file:
        file.write(render(page).encode())
    return run / FILE_NAME


def render(page: dict[str, Any]) -> str:
    return build_page(TEMPLATE, page)


def find_protocol_results(evals: Path, weights_sha256: str) -> list[ProtocolResult]:
    """Reports on these very weights, each beside the one that asked the same of fresh weights, where there is one."""
    reports = [EvalReport.load(path) for path in sorted(evals.glob("*.json"))]
    found = []
    for trained in reports:
        if trained.weights_sha256 != weights_sha256:
            continue
        fresh = (r for r in reports if r.encoder["tag"] == "random" and _question(r) == _question(trained))
        random = next(fresh, None)
        interval = difference(trained, random).interval if random is not None else None
        found.append(ProtocolResult(_protocol_name(trained), trained, random, interval))
    return found


def _question(report: EvalReport) -> tuple[object, ...]:
    found = config_class(report.evaluator).found if report.evaluator in KINDS else frozenset()
    asked = {name: value for name, value in report.protocol.items() if name not in found}
    return report.evaluator, asked, report.data


def _protocol_name(report: EvalReport) -> str:
    if report.evaluator not in KINDS:
        return report.evaluator
    return config_class(report.evaluator).title.format_map(report.protocol)


def _metrics(path: Path) -> list[dict[str, float]]:
    try:
        return [json.loads(line) for line in path.read_text("utf-8").splitlines()]
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


def _painter(model: ModelConfig, config: ObjectiveConfig, checkpoint: Path) -> Painter | None:
    """The objective with the weights of the checkpoint, where it paints."""
    with torch.random.fork_rng(devices=[]):
        objective = build_objective(model, config)
    painter = find_painter(objective)
    if painter is not None:
        load_strictly(objective, module_state(checkpoint), where=str(checkpoint))
    return painter


def _reconstructions(data: Data, painter: Painter) -> list[list[Picture]]:
    dataset = open_training(data.val or data.train, data.cache)
    return draw_reconstructions(painter, dataset, data, NUM_RECONSTRUCTIONS)


def _hidden_share(painter: Painter | None) -> float:
    mask = painter.needs.mask if painter is not None else None
    return mask.num_hidden / mask.num_patches if mask is not None else 0.0


def _neighbors(run: Path, data: Data, trained: Encoder) -> list[Neighbors]:
    """Nothing where no data is kept apart from training."""
    if data.val is None:
        return []
    return neighbours(
        {"trained": trained, "random start": load_source(str(run), random_init=True)},
        open_training(data.train, data.cache),
        open_dataset(data.val, data.cache),
        num_queries=NUM_QUERIES,
        bank_size=BANK_SIZE,
        k=NUM_NEIGHBOURS,
        max_pixels=data.max_pixels,
    )


def _environment(path: Path) -> dict[str, str]:
    """`environment.json` as rows of a table."""
    try:
        told = json.loads(path.read_text("utf-8"))
        rows = {key: value for key, value in told.items() if not isinstance(value, dict)}
        rows["packages"] = ", ".join(f"{name} {v}" for name, v in told["packages"].items() if v)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise InputError(
            where=str(path), expected="what the run ran on", found=f"{type(error).__name__}: {error}"
        ) from None
    rows["arguments"] = " ".join(rows.get("arguments", []))
    return {key.replace("_", " "): str(value) for key, value in rows.items() if value is not None}
