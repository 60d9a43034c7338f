"""Run folders for tests, made without training: by the code that writes them, and as the brief of a job has it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from pretrain.checkpoints.writer import CheckpointWriter
from pretrain.engine.training_state import Fragment
from pretrain.monitoring.log import MetricLog
from pretrain.recipe.files import dump, resolved_yaml
from pretrain.recipe.resolve import resolve
from pretrain.record import claimed as claimed_by_this_process
from pretrain.runtime.collectives import World
from pretrain.runtime.state import Progress, RunState
from tests.recipe.recipes import SMALL, load

TOTAL_STEPS = 30


def make_run(folder: Path, *, logged: int = 0, saved: int = 0) -> Path:
    """As a run leaves it behind that logged each step up to `logged`, and saved `saved`."""
    folder.mkdir(parents=True)
    recipe = load(folder, {**SMALL, "schedule": {"steps": TOTAL_STEPS}, "batch": {"global_size": 8}})
    (folder / "recipe.yaml").write_text(dump(recipe))
    (folder / "resolved.yaml").write_text(resolved_yaml(recipe, resolve(recipe, 1, 100)) + "data_fingerprint: a\n")
    log = MetricLog(folder, step=0, total_steps=TOTAL_STEPS, active=True)
    for step in range(1, logged + 1):
        log.write(step, {"loss": 1.0, "images_per_second": 100.0 + step})
        log.progress(step, {"loss": 1.0})
    if logged:
        log.write(logged, {"knn_top1": 0.5})  # an evaluation's line has no rate
    log.close()
    if saved:
        writer = CheckpointWriter(folder / "checkpoints", Held(), world=World(), keep_last=2, say=lambda _: None)
        writer.save(RunState(Progress(saved, TOTAL_STEPS, 8 * saved)))
        writer.finish()
    return folder


class Held:
    """A training state of one tensor."""

    stage = 1

    def fragments(self) -> list[Fragment]:
        return [Fragment("param/a", (3,), 0, torch.zeros(3), replicated=False)]

    def group_values(self) -> list[dict[str, Any]]:
        return [{"name": "decay", "step": 1.0, "lr": 0.1}]


@contextmanager
def claimed(run: Path) -> Iterator[None]:
    """Another process at work in the folder."""
    context = get_context("fork")
    ready, end = context.Event(), context.Event()
    process = context.Process(target=_claim, args=(run, ready, end))
    process.start()
    try:
        assert ready.wait(60)
        yield
    finally:
        end.set()
        process.join()


def _claim(run: Path, ready: Any, end: Any) -> None:
    with claimed_by_this_process(run, World(), lambda: None):
        ready.set()
        end.wait()


def submit(run: Path, job_id: str = "7", *, executor: str = "slurm", at: float | None = None) -> Path:
    """As a submission leaves it."""
    (run / "job" / "slurm").mkdir(parents=True, exist_ok=True)
    submitted = {"recipe": "r.yaml", "overrides": [], "executor": executor, "job_id": job_id, "nodes": 2,
                 "ranks_per_node": 2, "submitted_at": time.time() if at is None else at, "cluster": "c"}  # fmt: skip
    (run / "job" / "recipe.yaml").write_text("name: r\n")
    (run / "job" / "submitted.json").write_text(json.dumps(submitted))
    return run


def event(run: Path, kind: str, attempt: int = 0, **more: Any) -> None:
    """As an agent appends it."""
    if kind == "start":
        more = {"job_id": "7", "nodes": ["n0", "n1"], **more}
    with (run / "job" / "attempts.jsonl").open("a") as file:
        file.write(json.dumps({"event": kind, "at": time.time(), "attempt": attempt, **more}) + "\n")


class Commands:
    """Commands of SLURM's that say what a test wants them to say."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()

    def says(self, command: str, text: str = "", *, when: str = "*", status: int = 0) -> None:
        """`command` prints `text` where its arguments match the shell pattern `when`; what is said last goes first."""
        path = self.folder / command
        stream = 2 if status else 1
        case = f"case \"$*\" in {when}) cat >&{stream} <<'END'\n{text}\nEND\nexit {status};; esac\n"
        before = path.read_text().removeprefix("#!/bin/sh\n") if path.exists() else ""
        part = path.with_suffix(".part")
        part.write_text(f"#!/bin/sh\n{case}{before}")
        part.chmod(0o755)
        part.replace(path)  # at once, as it may be running
