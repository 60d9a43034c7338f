"""Whole runs for tests: recipes, their start in forked ranks, and what they logged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from data_pipeline.durable import read_lines
from pretrain.runtime.collectives import World
from tests.gate import Gate, until
from tests.ranks import Ranks, started

MODEL: dict[str, Any] = {
    "name": "vit_tiny_patch16_224", "image_size": 16, "patch_size": 4,
    "options": {"embed_dim": 32, "depth": 2, "num_heads": 2, "class_token": False,
                "global_pool": "avg", "fc_norm": False},
}  # fmt: skip


def write_recipe(path: Path, shards: Path | str, **groups: object) -> Path:
    """MAE in batches of 8 with losses to compare; `groups` replace whole groups."""
    tree = {
        "name": "tiny",
        "data": {"train": str(shards), "read_streams": 3, "shuffle_window": 16},
        "model": MODEL,
        "objective": {"kind": "mae", "decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2},
        "optim": {"base_lr": 1e-2, "clip_norm": 1.0},
        "schedule": {"steps": 40, "warmup": 0.1},
        "batch": {"global_size": 8},
        "engine": {"zero_stage": 2, "precision": "fp32"},
        "runtime": {"peak_tflops": 0.1, "threads": 1},
        "logging": {"every_steps": 1, "tensorboard": False},
        "checkpoint": {"every_steps": 5},
        **groups,
    }
    path.write_text(yaml.safe_dump(tree))
    return path


@contextmanager
def running(
    recipe: Path, out: Path, nproc: int = 1, *overrides: str, gate: Gate | None = None, **arguments: Any
) -> Iterator[Ranks]:
    """The ranks of a run at work; killed at the end."""
    with started(_run, nproc, recipe, out, overrides, arguments, gate, joined=False) as ranks:
        yield ranks


def wait_for_step(ranks: Ranks, out: Path, step: int) -> None:
    """Until the run has logged it; an AssertionError where a rank ends before."""
    until(
        lambda: max(losses(out), default=0) >= step,
        meanwhile=lambda: all(process.is_alive() for process in ranks.processes),
    )


def train(recipe: Path, out: Path, nproc: int = 1, *overrides: str, **arguments: Any) -> str:
    """A run to its end; an AssertionError with its traceback where it fails. Returns its log so far."""
    with running(recipe, out, nproc, *overrides, **arguments) as ranks:
        ranks.results()
    return (out / "log-rank0.txt").read_text()


def _run(
    _: World, recipe: Path, out: Path, overrides: Sequence[str], arguments: dict[str, Any], gate: Gate | None
) -> bool:
    from pretrain.recipe.files import load_recipe
    from pretrain.run import run

    if gate is not None:
        gate.hold()
    return run(load_recipe(recipe, list(overrides)), out, **arguments)


def losses(out: Path) -> dict[int, float]:
    """By step; an AssertionError where a step was logged twice."""
    lines = read_lines(out / "metrics.jsonl")  # also while it is written
    steps = [line["step"] for line in lines if "loss" in line]
    assert len(steps) == len(set(steps)), "a step was logged twice"
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def logged(out: Path, *names: str) -> dict[int, dict[str, float]]:
    """Values by step, of the lines that have the first of the names."""
    lines = read_lines(out / "metrics.jsonl")
    return {line["step"]: {name: line[name] for name in names} for line in lines if names[0] in line}
