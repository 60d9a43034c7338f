"""What a report says of a run in words: trained on what, when, by which machine, and what that leaves to claim."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from data_pipeline.batch import BatchSpec
from data_pipeline.datasets.dataset import Dataset, singles
from data_pipeline.durable import from_json
from data_pipeline.errors import InputError
from pretrain.recipe.recipe import Recipe
from pretrain.reports.report_figures import num_classes
from pretrain.runtime.run_folder import COMPLETE
from pretrain.runtime.state import Progress


def run_facts(
    recipe: Recipe,
    progress: Progress,
    checkpoint: Path,
    environment: Mapping[str, Any],
    train: Dataset,
    val: Dataset | None,
) -> dict[str, str]:
    """What stands on top of a report: what was trained, on how much of what, and when."""
    saved = datetime.fromtimestamp((checkpoint / COMPLETE).stat().st_mtime, UTC)
    started = str(environment.get("started", ""))[:16].replace("T", " ")
    paths = [recipe.data.train] if isinstance(recipe.data.train, str) else [one.path for one in recipe.data.train]
    return {
        "trained": f"{recipe.objective.kind} on {recipe.model.name}",
        "data": f"{', '.join(paths)}: {_size(train)}",
        "validation": f"{recipe.data.val}: {_size(val)}" if val is not None else "none",
        "samples": f"{progress.samples_seen:,} samples seen in {progress.step:,} of {progress.total_steps:,} steps of "
        f"{recipe.batch.global_size:,}, {progress.samples_seen / max(1, train.num_samples):,.1f} epochs",
        "date": f"last started {started} UTC, " * bool(started) + f"{checkpoint.name} saved {saved:%Y-%m-%d %H:%M} UTC",
    }


def _size(dataset: Dataset) -> str:
    classes = num_classes(dataset)
    return f"{dataset.num_samples:,} samples" + (f" of {classes:,} classes" if classes else "")


def shown_data(train: Dataset, val: Dataset | None) -> str:
    """Which images a report shows, and whether the run was trained on them, as far as that is known."""
    if val is None:
        return "Images of the training set, as the run has no other"
    below = {data.fingerprint for part in singles(train) for data in (part, part.beneath()[0])} | {train.fingerprint}
    if val.fingerprint in below:
        return "Images of the validation set, which is part of the training set"
    return "Images of the validation set"


def learned_from(needs: BatchSpec, init_from: str | None) -> str:
    """What taught the encoder, in a sentence: whether its neighbors owe anything to labels."""
    if needs.num_classes is not None:
        said = "It was trained with labels, of these or of like images."
    elif needs.tokens is not None:
        said = "It was trained with captions; no class label was used."
    else:
        said = "No label was used in this training."
    return said if init_from is None else f"{said} It began from the weights of {init_from}."


def load_environment(path: Path) -> dict[str, Any]:
    """`environment.json` of a run; InputError where it is no such thing."""
    try:
        told = from_json(path.read_text("utf-8"))
        return {**told, "packages": {str(name): str(found) for name, found in told["packages"].items() if found}}
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(
            where=str(path), expected="what the run ran on", found=f"{type(error).__name__}: {error}"
        ) from None


def environment_rows(told: Mapping[str, Any]) -> dict[str, str]:
    """Its values in words, without the packages."""
    rows = {}
    for key, value in told.items():
        if value is None or isinstance(value, Mapping):
            continue
        if key == "hosts" and isinstance(value, list):
            hosts = Counter(map(str, value))
            text = ", ".join(f"{host} ({count} processes)" if count > 1 else host for host, count in hosts.items())
        elif key.endswith("_bytes") and isinstance(value, int | float):
            key, text = key.removesuffix("_bytes"), f"{value / 1e9:,.1f} GB"
        elif isinstance(value, list):
            text = (" " if key == "arguments" else ", ").join(map(str, value))
        else:
            text = str(value)
        rows[key.replace("_", " ")] = text
    return rows
