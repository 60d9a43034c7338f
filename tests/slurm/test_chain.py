"""Stages as jobs that wait for each other, and evaluations as jobs of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.jobs.cancel import cancel
from launch.jobs.folder import JobFolder
from tests.runs import losses
from tests.slurm.jobs import STEPS, Place, Submitted

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def write_chain(place: Place) -> Path:
    """Pretraining, and its judgement."""
    judged: dict[str, Any] = {"protocol": "knn", "encoder": "${mae}", "train": "train", "test": "val"}
    stages = [
        {"name": "mae", "train": "recipe.yaml"},
        {"name": "knn", "evaluate": {**judged, "options": {"k": 5}}},
    ]
    path = place.folder / "chain.yaml"
    path.write_text(yaml.safe_dump({"name": "tiny", "stages": stages}))
    return path


def events_of(folder: Path) -> list[str]:
    return [event["event"] for event in JobFolder(folder).events()]


@pytest.mark.seconds(130)
def test_stages_wait_for_each_other_and_go_on_after_a_failure(place: Place, expected: dict[int, float]) -> None:
    path, out = write_chain(place), place.folder / "chained"
    run, judged = out / "mae", out / "knn.job"
    gate = place.gate("chained", 40, 80)
    words = ("chain", str(path), "--cluster", str(place.cluster_file(setup=gate.setup())), "--out", "chained")
    printed = place.pretrain(*words, "--dry-run").stdout
    assert "afterok:<job of mae>" in printed
    assert not out.exists(), "a dry run writes nothing"

    place.pretrain(*words)
    assert place.cluster.job(JobFolder(judged).submitted()["job_id"])["JobState"] == "PENDING"
    again = place.pretrain(*words, check=False)
    assert again.returncode == 2
    assert "expected a run without a job" in again.stderr
    trained = Submitted(place.cluster, run, JobFolder(run).submitted()["job_id"], gate)
    trained.held(40)
    with place.cluster.spoken_to():
        cancel(out, now=False)
    gate.release(40)
    place.wait_for_all(out)
    assert events_of(run)[-1] == "cancel"
    assert "start" not in events_of(judged)

    place.pretrain(*words)
    trained = Submitted(place.cluster, run, JobFolder(run).submitted()["job_id"], gate)
    trained.held(80)
    place.cluster.run("scontrol", "requeue", trained.job_id)
    gate.release(80)
    place.wait_for_all(out)
    assert losses(run) == expected
    assert events_of(run)[-1] == events_of(judged)[-1] == "done", events_of(run) + events_of(judged)
    assert json.loads((out / "knn.json").read_text())["metric"] == "top1_k5"
    assert place.pretrain(*words).stdout.count("done before") == 2
    record = out / "chain" / "mae.json"
    known = record.read_text()
    record.unlink()  # made again, as far as can be told when it is queued
    place.cluster.run("scontrol", "update", "NodeName=n0,n1", "State=DRAIN", "Reason=test")
    place.pretrain(*words)
    record.write_text(known)  # and done before, as the job finds out, on both nodes
    place.cluster.run("scontrol", "update", "NodeName=n0,n1", "State=RESUME")
    place.wait_for_all(out)
    assert events_of(run)[-1] == events_of(judged)[-1] == "done", events_of(run) + events_of(judged)
    here = place.pretrain("chain", str(path), "--out", str(out), seconds=300).stdout
    assert here.count("done before") == 2, "what was done there is known on one machine"
    shown = place.pretrain("status", "chained").stdout
    assert shown.count("done") == 2


@pytest.mark.seconds(60)
def test_evaluations_are_jobs_that_training_does_not_wait_for(place: Place, expected: dict[int, float]) -> None:
    evals = "evals=[{kind: knn, train: train, test: val, every_epochs: 6, k: 5}]"
    job = place.submit("apart", "--set", evals, evals_apart=True)
    job.wait_until_over()
    job.check_whole(expected)
    place.wait_for_all(job.run)
    reports = sorted((job.run / "evals").glob("knn_step_*.json"))
    steps = [json.loads(path.read_text())["encoder"]["step"] for path in reports]
    assert [int(path.stem.rpartition("_")[2]) for path in reports] == steps
    assert len(steps) == 2, f"of every six epochs, of which there are twelve\n{job.told()}"
    assert STEPS // 2 <= steps[0] < steps[1] == STEPS
    assert not list((job.run / "held_knn").iterdir()), "what was held is let go"
    logged = [json.loads(line) for line in (job.run / "metrics.jsonl").read_text().splitlines()]
    assert not any(key.startswith("knn/") for line in logged for key in line)
