"""What a job's ranks are told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launch.jobs import job
from launch.jobs.folder import JobFolder
from launch.jobs.node import Node
from launch.jobs.rendezvous import Rendezvous
from tests.runs import write_recipe
from tests.shards import write_shards


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
    folder = JobFolder(tmp_path)
    recipe = write_recipe(tmp_path / "r.yaml", write_shards(tmp_path / "shards", 8), runtime={"device": device})
    folder.write("recipe.yaml", recipe.read_text())
    folder.write("cluster.yaml", f"{{ranks_per_node: 2, gpus_per_node: {gpus}}}")
    folder.write("submitted.json", json.dumps({}))
    assert job._run_share(folder, Node("n0", 0, 1, "7", 0), Rendezvous("127.0.0.1", 1, 0)) == 0
    assert ("--set=runtime.device=cuda" in told) == required
