"""A suite by jobs of a cluster."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import InputError, RunError
from launch.jobs.queue import PlannedJob
from launch.suites.run import _job
from tests.launch.run_folders import Commands, submit
from tests.launch.suites import cells, refused, run_suite, submit_suite, write_suite


def test_a_dry_run_prints_a_script_for_each_result(
    tmp_path: Path, tree: dict[str, Any], cluster: Commands, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = tmp_path / "cluster.yaml"
    asked.write_text("partition: short\nranks_per_node: 4\ncpus_per_rank: 2\ntime_minutes: 20\n")
    submit_suite(write_suite(tmp_path, tree), asked, tmp_path / "out", dry_run=True)
    scripts = capsys.readouterr().out
    assert scripts.count("#!/bin/bash") == 6
    assert "--job-name=small-second-colours-linear" in scripts
    assert scripts.count("#SBATCH --cpus-per-task=2") == 6, "one rank's share of a node"
    assert not (tmp_path / "out").exists()


def test_a_job_is_queued_for_each_result_that_is_missing(
    done: tuple[Path, dict[str, Any]], tree: dict[str, Any], cluster: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, one = done
    (folder / "cluster.yaml").write_text("partition: short\ntime_minutes: 20\n")
    path = write_suite(folder, {**one, "protocols": tree["protocols"]})
    queued: list[dict[str, Any]] = []

    def queue(job: PlannedJob, *_: object) -> str:
        queued.append({"where": job.folder, "name": job.name, **job.record})
        return "17"

    monkeypatch.setattr("launch.jobs.queue._queue", queue)
    submit_suite(path, folder / "cluster.yaml", folder / "out")
    (job,) = queued
    assert job["name"] == "small-own-colours-linear"
    assert job["words"][:2] == ["eval", "linear"]
    assert ("--out", str(folder / "out" / "own" / "colours" / "linear.json")) in set(pairwise(job["words"]))
    asked = json.loads((folder / "out" / "suite" / "asked" / "own" / "colours" / "linear.json").read_text())
    assert asked["arguments"]["min_steps"] == 20


def test_what_a_job_is_to_answer_is_not_run_beside_it(tmp_path: Path, tree: dict[str, Any], commands: Commands) -> None:
    path, (cell, *_) = write_suite(tmp_path, tree), cells(tmp_path, tree)
    submit(_job(tmp_path / "out", cell), "17")
    commands.says("scontrol", "JobId=17 JobState=PENDING", when="show*17")
    with pytest.raises(InputError, match="job 17, pending"):
        run_suite(path, tmp_path / "out", devices=[], run=refused)
    assert not cell.asked.exists()


@pytest.mark.parametrize("error", [RunError("sbatch", "SLURM to take the job", "QOSMax"), KeyboardInterrupt()])
def test_all_of_a_suite_is_queued_or_nothing(
    tmp_path: Path, tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    (tmp_path / "cluster.yaml").write_text("partition: short\ntime_minutes: 20\n")
    folders: list[Path] = []

    def queue(job: PlannedJob, *_: object) -> str:
        if len(folders) == 2:
            raise error
        folders.append(job.folder)
        return f"1{len(folders)}"

    said: list[tuple[str, ...]] = []
    monkeypatch.setattr("launch.jobs.queue._queue", queue)
    monkeypatch.setattr("launch.jobs.submission.check_cluster", lambda *_: None)
    monkeypatch.setattr("launch.jobs.queue.slurm", lambda *words, **_: said.append(words))
    with pytest.raises(type(error)):
        submit_suite(write_suite(tmp_path, tree), tmp_path / "cluster.yaml", tmp_path / "out")
    assert said == [("scancel", "11", "12")]


def test_each_job_has_a_folder_of_its_own(tmp_path: Path, tree: dict[str, Any]) -> None:
    names = {"encoders": {"a": tree["encoders"]["first"], "a-b": tree["encoders"]["second"]}}
    names["datasets"] = dict.fromkeys(("b-c", "c"), tree["datasets"]["colours"])
    found = cells(tmp_path, {**tree, **names})
    assert len({_job(tmp_path, cell) for cell in found}) == len(found)
