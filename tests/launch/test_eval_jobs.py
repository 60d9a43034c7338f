"""Which checkpoints are judged by jobs of their own, and how long what they judge is held."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from launch.cluster import Cluster
from launch.eval_jobs import Due, apart, let_go
from launch.eval_submit import _hold
from launch.job_folder import JobFolder
from pretrain.recipe_io import load_recipe
from pretrain.run_folder import COMPLETE, eval_name, folder_name
from tests.runs import write_recipe
from tests.shards import write_shards

EVALS = [
    {"kind": "knn", "train": "a", "test": "b", "every_epochs": 2},  # 80 samples by 8: 20 steps
    {"kind": "knn", "train": "a", "test": "c", "every_epochs": 3},
]


@pytest.fixture
def due(tmp_path: Path) -> Due:
    shards = write_shards(tmp_path / "shards", 80)
    recipe = write_recipe(tmp_path / "r.yaml", shards, batch={"global_size": 8}, schedule={"steps": 65}, evals=EVALS)
    return Due(tmp_path / "run", load_recipe(recipe), Cluster(ranks_per_node=2, evals_apart=True))


def save(run: Path, *steps: int) -> None:
    for step in steps:
        folder = run / "checkpoints" / folder_name(step)
        folder.mkdir(parents=True)
        (folder / COMPLETE).write_text(str(step))


def queue(run: Path, entries: list[tuple[int, int]]) -> None:
    for index, step in entries:
        JobFolder(run / "evals" / f"{eval_name(index)}_{folder_name(step)}.job").write("submitted.json", "{}")


def test_each_entry_judges_the_first_checkpoint_of_each_of_its_periods_and_the_last(due: Due, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert due.entries() == []
    save(run, 8, 16)
    assert due.entries() == []
    save(run, 24, 32)
    assert due.entries() == [(0, 24), (1, 32)]
    queue(run, due.entries())
    assert due.entries() == []
    save(run, 40, 48, 64)
    assert due.entries() == [(0, 40), (0, 64), (1, 64)]
    queue(run, due.entries())
    save(run, 65)
    assert due.entries() == [(0, 65), (1, 65)]
    queue(run, due.entries())
    assert due.entries() == []


def test_only_a_job_of_slurm_has_its_evaluations_apart(
    due: Due, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(tmp_path / "r.yaml")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert not apart(recipe, Cluster(evals_apart=True))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert apart(recipe, Cluster(evals_apart=True))
    assert not apart(recipe, Cluster())
    assert not apart(recipe.model_copy(update={"evals": ()}), Cluster(evals_apart=True))


def test_what_is_judged_is_held_until_its_last_job_is_over(tmp_path: Path) -> None:
    save(tmp_path, 8)
    checkpoint, held = tmp_path / "checkpoints" / folder_name(8), tmp_path / "held" / folder_name(8)
    held.parent.mkdir()
    _hold(checkpoint, held)
    _hold(checkpoint, held)  # for the other entry
    assert os.path.samefile(checkpoint / COMPLETE, held / COMPLETE), "no bytes are copied"
    queue(tmp_path, [(0, 8), (1, 8)])
    jobs = [JobFolder(path) for path in sorted((tmp_path / "evals").iterdir())]
    jobs[0].note("done")
    let_go(held, tmp_path)
    assert held.is_dir()
    jobs[1].note("stop")
    let_go(held, tmp_path)
    assert not held.exists()
    assert (checkpoint / COMPLETE).read_text() == "8"
