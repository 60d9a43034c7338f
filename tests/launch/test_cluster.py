"""Cluster files: what is refused, and what becomes of them."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from data_pipeline.errors import RecipeError
from launch.jobs.batch import batch_script
from launch.jobs.folder import JobFolder
from launch.slurm.cluster import Cluster, load_cluster
from launch.slurm.commands import from_outside, parse_fields, parse_minutes

CLUSTERS = Path(__file__).resolve().parents[2] / "configs" / "cluster"


@pytest.mark.parametrize("path", sorted(CLUSTERS.glob("*.yaml")), ids=lambda path: path.stem)
def test_those_that_are_here_are_valid(path: Path) -> None:
    cluster = load_cluster(path)
    assert cluster.world_size == cluster.nodes * cluster.ranks_per_node
    assert f"--cluster configs/cluster/{path.name}" in path.read_text()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("partiton: gpu", "partition"),
        ("nodes: 0", "nodes: expected at least 1, found 0"),
        ("nodes: two", "nodes: expected a whole number, found"),
        ("{ranks_per_node: 8, gpus_per_node: 4}", "expected gpus_per_node 8, one for each of ranks_per_node"),
        ("{time_minutes: 2, signal_lead_seconds: 120}", "expected signal_lead_seconds below the time limit of 120 s"),
        ("sbatch: {account: me}", "expected `account` for what sbatch.account says"),
        ("sbatch: {cpus_per_task: 3}", "expected `cpus_per_rank` for what sbatch.cpus_per_task says"),
        ("sbatch: {array: 1-3}", "expected no sbatch.array"),
        ("sbatch: {parsable: true}", "expected no sbatch.parsable"),
        ("sbatch: {hold: true}", "expected no sbatch.hold"),
        ("sbatch: {gres: 'lscratch:100,gpu:a100:4'}", "expected `gpus_per_node` and `gpu_type` for GPUs"),
        ("gpu_type: a100", "expected gpus_per_node with gpu_type a100, found 0"),
        ("nodes: 1\nnodes: 2", "nodes"),
    ],
)
def test_each_problem_names_its_key(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "cluster.yaml").write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_cluster(tmp_path / "cluster.yaml")
    assert told in str(caught.value)


def test_what_a_batch_script_asks_for() -> None:
    cluster = Cluster(
        ranks_per_node=4, gpus_per_node=4, gpu_type="a100", cpus_per_rank=12, setup=("module load cuda", "set -e"),
        sbatch={"gres": "lscratch:100", "exclusive": False, "contiguous": True, "mail_type": "END"},
    )  # fmt: skip
    lines = batch_script(Path("/runs/r"), "r", cluster, Path("/runs/r/code/1")).splitlines()
    asked = [line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")]
    assert {"gpus-per-node=a100:4", "gres=lscratch:100", "contiguous", "mail-type=END", "cpus-per-task=48"} <= set(
        asked
    )
    assert not [line for line in asked if "exclusive" in line]
    (srun,) = (line for line in lines if line.startswith("srun"))
    assert "--cpus-per-task=48" in srun, "which it does not take from sbatch"
    before = lines[: lines.index(srun)]
    assert before.index("set +e") > before.index("set -e"), "what comes after srun is done however srun ends"


def test_setup_lines_keep_what_modules_put_on_pythons_path_behind_the_copy() -> None:
    script_of = batch_script(Path("/runs/r"), "r", Cluster(setup=("export PYTHONPATH=/opt/torch",)), Path("/runs/a b"))
    lines = [line for line in script_of.splitlines() if line.startswith("export PYTHONPATH")]
    said = subprocess.run(["sh", "-c", "\n".join([*lines, "echo $PYTHONPATH"])], capture_output=True, text=True)
    assert said.stdout == "/runs/a b:/opt/torch\n"


def test_a_job_inherits_nothing_of_the_one_around_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    monkeypatch.setenv("SLURM_MEM_PER_CPU", "4000")
    monkeypatch.setenv("SLURM_JOB_ID", "99")
    monkeypatch.setenv("SBATCH_ACCOUNT", "vision")
    with from_outside():
        assert "SLURM_JOB_ID" not in os.environ
        assert "SLURM_MEM_PER_CPU" not in os.environ
        assert os.environ["SLURM_CONF"] == "/etc/slurm.conf"
        assert os.environ["SBATCH_ACCOUNT"] == "vision"
    assert os.environ["SLURM_JOB_ID"] == "99"


def test_what_slurm_writes_is_read() -> None:
    assert [parse_minutes(text) for text in ("1-00:30:00", "02:00:00", "30:00", "UNLIMITED")] == [1470, 120, 30, None]
    assert parse_fields("JobId=7 JobName=a=b Reason=None")["JobName"] == "a=b"


def test_a_line_that_a_kill_cut_short_is_passed_over(tmp_path: Path) -> None:
    folder = JobFolder(tmp_path)
    folder.write("recipe.yaml", "")
    folder.note("start", attempt=0)
    with (folder.path / "attempts.jsonl").open("ab") as file:
        file.write(b'{"event": "en')
    assert [event["event"] for event in folder.events()] == ["start"]
    folder.note("start", attempt=1)
    folder.note("end", attempt=1)
    assert [event["event"] for event in folder.events()] == ["start", "start", "end"]
    assert folder.num_attempts() == 2
