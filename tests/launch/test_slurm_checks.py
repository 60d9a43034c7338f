"""A cluster file against what SLURM says of its partitions, nodes and accounts."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from data_pipeline.errors import InputError
from launch.doctor import doctor
from launch.jobs.submission import PlannedJob, submit_jobs
from launch.slurm.checks import check_folder_name, check_script, check_slurm
from launch.slurm.cluster import Cluster
from tests.launch.findings import asked, levels, problems
from tests.launch.run_folders import Commands


def test_a_cluster_that_fits(cluster: Commands) -> None:
    found = list(check_slurm(asked(account="vision", qos="high")))
    assert problems(found) == ""
    assert levels(found) == [("ok", "SLURM"), ("ok", "nodes"), ("ok", "partition"), ("ok", "account")]


@pytest.mark.parametrize(
    ("cluster_file", "expected"),
    [
        (asked(partition="lnog"), "expected one of the cluster's, found lnog. Did you mean long? It has: short, long"),
        (asked(partition="old", gpus_per_node=0), "old is DOWN"),
        (asked(partition="short", nodes=1), "59 minutes, and short gives 30 at most. Set time_minutes to 30 or less"),
        (asked(partition=None, nodes=2), "59 minutes, and short gives 30 at most"),
        (asked(partition="short", time_minutes=10), "2, and short gives a job 1 at most"),
        (asked(account="audio"), "audio, and long takes vision,text"),
        (asked(account="audio"), "audio, expected one of yours. Set account to text or vision."),
        (asked(account="text", qos="high"), "high, expected one of the account's. Set qos to normal."),
        (asked(nodes=7), "6 of long have 32 CPUs, 4 GPUs and 100 GB, expected 7"),
        (asked(gpus_per_node=8, ranks_per_node=8), "0 of long have 64 CPUs, 8 GPUs and 100 GB, expected 2"),
        (asked(memory_gb=300.0), "0 of long have"),
        (asked(cpus_per_rank=32), "0 of long have 128 CPUs"),
        (asked(gpu_type="h100"), "0 of long have 32 CPUs, h100:4 GPUs"),
        (asked(partition="short,lnog"), "expected one of the cluster's, found lnog"),
        (asked(partition="old,short"), "old is DOWN"),
    ],
)
def test_what_a_cluster_does_not_have(cluster: Commands, cluster_file: Cluster, expected: str) -> None:
    found = list(check_slurm(cluster_file))
    assert expected in problems(found)
    assert "error" in {finding.level for finding in found}


def test_nodes_that_could_not_be_looked_at_are_told(cluster: Commands) -> None:
    cluster.says("sinfo", "sinfo: error: Conflicting options", status=1)
    found = list(check_slurm(asked(account="vision")))
    assert [pair for pair in levels(found) if pair[0] != "ok"] == [("warning", "nodes")]
    assert "sinfo could not be asked: sinfo: error: Conflicting options" in problems(found)


def test_of_several_partitions_one_that_fits_is_enough(cluster: Commands) -> None:
    assert problems(check_slurm(asked(partition="old,long", gpu_type="a100"))) == ""


def test_slurm_that_is_not_there_or_does_not_answer(commands: Commands) -> None:
    assert levels(check_slurm(None)) == [("ok", "SLURM")]
    assert "no sbatch, squeue, scontrol on PATH" in problems(check_slurm(asked()))
    for name in ("sbatch", "squeue"):
        commands.says(name)
    commands.says("scontrol", "slurm_load_ping error: Unable to contact slurm controller", status=1)
    assert levels(check_slurm(None)) == [("warning", "SLURM")]
    assert levels(check_slurm(asked())) == [("error", "SLURM")]
    assert "Unable to contact slurm controller. See that slurm.conf" in problems(check_slurm(asked()))


def test_a_path_that_slurm_reads_as_a_pattern_is_refused_alike_by_submit_and_doctor(tmp_path: Path) -> None:
    out, cluster_file = tmp_path / "100%" / "run", tmp_path / "c.yaml"
    cluster_file.write_text("time_minutes: 10\n")
    told = f"{out} has '%' in its path, which SLURM reads as a pattern"
    for local in (True, False):
        with pytest.raises(InputError, match=re.escape(told)):
            submit_jobs([PlannedJob(out, "j", Cluster(time_minutes=10))], cluster_file, out, local=local)
    assert not out.parent.exists()
    findings = doctor.findings(None, [], cluster_file, 1, out)
    assert [finding.found for finding in findings if finding.what == "run folder" and "SLURM" in finding.found] == [
        told
    ]
    assert not list(check_folder_name(tmp_path / "plain name,=:'~"))


def test_a_cluster_without_accounting_is_only_warned_of(cluster: Commands) -> None:
    for name in ("sacct", "sacctmgr"):
        cluster.says(name, "Slurm accounting storage is disabled", status=1)
    found = list(check_slurm(asked(account="vision")))
    assert [pair for pair in levels(found) if pair[0] != "ok"] == [("warning", "sacct"), ("warning", "account")]


def test_an_account_that_has_to_be_named(cluster: Commands) -> None:
    assert problems(check_slurm(asked(account=None))) == ""  # the default one is taken there
    cluster.says("sacctmgr", "audio", when="*show?user*")
    assert "none, which is audio here, and long takes vision,text. Set account to" in problems(check_slurm(asked()))
    cluster.says("sacctmgr", "Unable to contact slurmdbd", status=1, when="*show?user*")
    assert problems(check_slurm(asked())) == "", "sbatch will say"


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("allocation failure: Invalid account or account/partition combination specified", "account"),
        ("sbatch: error: Invalid qos specification", "qos"),
        ("allocation failure: Invalid generic resource (gres) specification", "gpus_per_node"),
        ("allocation failure: Requested node configuration is not available", None),
        ("allocation failure: Nodes required for job are DOWN, DRAINED or reserved", None),
    ],
)
def test_what_slurm_itself_would_refuse(cluster: Commands, said: str, expected: str | None) -> None:
    cluster.says("sbatch", said, status=1, when="--test-only")
    found = list(check_script("#!/bin/sh"))
    assert [finding.what for finding in found] == ([expected] if expected else [])
    assert all(finding.found in said for finding in found)
