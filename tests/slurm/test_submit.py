"""A run on two nodes from submission to its judgement, and what is refused before or in the first seconds."""

from __future__ import annotations

import json
import sys

import pytest

from data_pipeline.errors import RunError
from launch.jobs.drill import _compare
from launch.jobs.folder import JobFolder
from launch.jobs.node import attempt_folder
from tests.runs import losses
from tests.slurm.cluster import NODES
from tests.slurm.jobs import CANARY, CHECKOUT, STEPS, Place

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.mark.seconds(45)
def test_two_nodes_train_and_the_encoder_is_judged(place: Place, expected: dict[int, float]) -> None:
    printed = place.pretrain("submit", "recipe.yaml", "--cluster", str(place.cluster_file()), "--dry-run").stdout
    assert "#SBATCH --nodes=2" in printed
    assert "#SBATCH --signal=USR2@30" in printed
    assert not (place.folder / "runs").exists(), "a dry run writes nothing"
    place.cluster.run(
        "sbatch", "-N2", "-n2", f"--chdir={place.folder}", "--output=srun.log",
        f"--wrap=PYTHONPATH={CHECKOUT} srun {sys.executable} -P -m pretrain recipe.yaml --out by_srun",
    )  # fmt: skip
    job = place.submit("two", "--set", "logging.wandb={project: tiny, mode: offline}")
    running = place.pretrain(
        "submit", "recipe.yaml", "--cluster", str(place.cluster_file()), "--out", "two", check=False
    )
    assert running.returncode == 2
    assert f"job {job.job_id}" in running.stderr
    job.wait_until_over()
    job.check_whole(expected)
    assert job.last("start")["nodes"] == ["n0", "n1"]
    judged = place.pretrain("eval", "knn", "two", "--train", "train", "--test", "val", "--k", "5").stdout
    assert "top1" in judged
    shown = place.pretrain("status", "two").stdout
    assert "done" in shown
    assert f"{STEPS}/{STEPS}" in shown
    assert place.pretrain("logs", "two").stdout.rstrip().endswith("done")
    files = [path for path in job.run.rglob("*") if path.is_file()]
    assert any("wandb" in str(path) for path in files)
    place.wait_for_all(place.folder)
    assert losses(place.folder / "by_srun") == expected, (place.folder / "srun.log").read_text()  # one run of two ranks
    told = [path for path in files if CANARY.encode() in path.read_bytes()]
    assert not told, "what is secret in the environment stays there"
    assert CANARY not in printed


@pytest.mark.seconds(12)
def test_what_can_be_known_before_is_refused_by_its_field(place: Place) -> None:
    for words, keys, told in (
        ((), {"partition": "gpu"}, "partition: expected one of the cluster's, found gpu. It has: main, lab."),
        ((), {"time_minutes": 100}, "time_minutes: 100 minutes, and main gives 60 at most"),
        ((), {"nodes": 4}, "expected 4"),
        ((), {"partition": "lab", "account": "audio"}, "account: audio, and lab takes vision"),
        (("--set", "data.train=nowhere"), {}, "nowhere"),
        (("--set", "batch.global_size=7"), {}, "batch.global_size"),
        ((), {"sbatch": {"partition": "main"}}, "expected `partition` for what sbatch.partition says"),
        ((), {"signal_lead_seconds": 600}, "signal_lead_seconds below the time limit"),
    ):
        file = place.cluster_file(**keys)
        done = place.pretrain("submit", "recipe.yaml", "--cluster", str(file), "--out", "refused", *words, check=False)
        assert done.returncode == 2, done.stdout + done.stderr
        assert told in done.stderr
        assert not (place.folder / "refused").exists()


@pytest.mark.seconds(35)
@pytest.mark.parametrize(("hidden", "told"), [("unshared", "run's folder"), ("train", "on n1: expected")])
def test_what_a_node_does_not_see_is_told_in_the_first_minute(place: Place, hidden: str, told: str) -> None:
    (place.folder / hidden).mkdir(exist_ok=True)
    with place.cluster.not_shared("n1", place.folder / hidden):
        job = place.submit("unshared" if hidden == "unshared" else "unread")
        job.wait_until_over()
    assert job.events() == ["start", "end", "stop"], job.told()
    start, _, stop = JobFolder(job.run).events()
    assert "n1" in stop["why"]
    assert told in stop["why"]
    left = attempt_folder(job.run, job.job_id, 0)
    reports = [json.loads((left / f"{node}.json").read_bytes()) for node in NODES if (left / f"{node}.json").exists()]
    first = min(reports, key=lambda report: report["at"])
    assert told in first["why"]
    assert first["at"] - start["at"] < 60, "how long SLURM then takes over the job's end is its own"
    assert place.cluster.job(job.job_id)["JobState"] == "FAILED", "what waits for it is not started"


@pytest.mark.seconds(75)
def test_a_drill_passes_here_and_fails_where_a_loss_is_another(place: Place) -> None:
    gate = place.gate("drill", 40, 100)  # wherever the first attempt stops, the second saves at 80 before it is held
    file = place.cluster_file(nodes=1, setup=gate.setup())
    words = ("drill", "recipe.yaml", "--cluster", str(file), "--steps", "120", "--out", "drill")
    said: list[str] = []
    with place.begun(*words) as command:
        assert command.stdout is not None
        for line in command.stdout:
            if said and ("is warned as before its time limit" in said[-1] or "are killed" in said[-1]):
                gate.release(40 if "is warned" in said[-1] else 100)  # what it said, it has done
            said.append(line)
            print(line, end="")
    assert "passed: 120 losses equal to the bit over 3 attempts" in said[-1], "".join(said)
    again = place.pretrain(*words, check=False)
    assert again.returncode == 2
    assert "expected no earlier drill" in again.stderr
    metrics = place.folder / "drill" / "disturbed" / "metrics.jsonl"
    lines = metrics.read_text().splitlines()
    record = json.loads(lines[70])
    lines[70] = json.dumps({**record, "loss": record["loss"] * (1 + 1e-6)})
    metrics.write_text("\n".join(lines) + "\n")
    with pytest.raises(RunError, match=r"1 of 120 that differ, the first at step \d+, by 1\.\de-06"):
        _compare(place.folder / "drill" / "alone", place.folder / "drill" / "disturbed", 120)
