"""What a job's ranks are told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launch.jobs import job
from launch.jobs.folder import JobFolder
from launch.jobs.job import Node
from launch.slurm.cluster import Cluster
from pretrain.recipe.files import load_recipe
from tests.runs import write_recipe


@pytest.mark.parametrize(
    ("gpus", "device", "required"), [(2, "auto", True), (2, "cpu", False), (0, "auto", False)]
)  # fmt: skip
def test_a_job_for_gpus_does_not_train_on_cpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus: int, device: str, required: bool
) -> None:
    """A node whose driver is ill would otherwise train on, slowly, for as long as it is let."""
    told: list[str] = []

    def launch(arguments: list[str], *_: Any, **__: Any) -> int:
        told.extend(arguments)
        return 0

    monkeypatch.setattr(job, "launch", launch)
    recipe = load_recipe(write_recipe(tmp_path / "r.yaml", "shards", runtime={"device": device}))
    JobFolder(tmp_path).write("submitted.json", json.dumps({}))
    meeting = {"address": "127.0.0.1", "port": 1, "attempt": 0}
    cluster = Cluster(ranks_per_node=2, gpus_per_node=gpus)
    assert job._run_ranks(tmp_path, recipe, cluster, Node("n0", 0, 1, "7", 0), meeting) == 0
    assert ("runtime.device=cuda" in told) == required
