"""A PATH of a test's own with a cluster on it that says what it has; and a suite, and one with a result."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.launch.run_folders import Commands
from tests.launch.suites import in_this_process, make_run, run_suite, tree_of, write_suite


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Commands:
    """No command of SLURM's on PATH but those that a test makes."""
    made = Commands(tmp_path / "commands")
    real = [part for part in os.environ["PATH"].split(":") if not (Path(part) / "sbatch").exists()]
    (tmp_path / "coreutils").mkdir()
    for name in ("cat", "sh"):
        found = next(Path(part, name) for part in os.environ["PATH"].split(":") if Path(part, name).exists())
        (tmp_path / "coreutils" / name).symlink_to(found)
    monkeypatch.setenv("PATH", ":".join([str(made.folder), str(tmp_path / "coreutils"), *real]))
    return made


PARTITIONS = """\
PartitionName=short AllowGroups=ALL AllowAccounts=ALL AllowQos=ALL Default=YES MaxNodes=1 MaxTime=00:30:00 State=UP
PartitionName=long AllowGroups=ALL AllowAccounts=vision,text AllowQos=ALL Default=NO MaxNodes=UNLIMITED \
MaxTime=2-00:00:00 Nodes=n[0-7] State=UP TotalNodes=8
PartitionName=old AllowGroups=ALL AllowAccounts=ALL AllowQos=ALL Default=NO MaxTime=UNLIMITED State=DOWN"""


@pytest.fixture
def cluster(commands: Commands) -> Commands:
    """A cluster that fits."""
    for name in ("sbatch", "squeue", "sacct"):
        commands.says(name)
    commands.says("scontrol", PARTITIONS, when="*show*partition*")
    commands.says("scontrol", "Slurmctld(primary) at head is UP", when="ping")
    commands.says("sinfo", "6 64 256000 gpu:a100:4(S:0-1)\n2 16+ 64000+ (null)")
    commands.says("sacctmgr", "vision", when="*show?user*")
    commands.says("sacctmgr", "vision|normal,high\ntext|normal", when="*show?associations*Account,QOS*")
    return commands


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return tree_of(tmp_path_factory.mktemp("suite"))


@pytest.fixture
def done(tmp_path: Path, tree: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    """A suite of one result that is there, with an encoder of its own."""
    own = make_run(tmp_path / "own", 7)
    one = {**tree, "encoders": {"own": str(own)}, "protocols": {"knn": tree["protocols"]["knn"]}}
    assert run_suite(write_suite(tmp_path, one), tmp_path / "out", devices=[], run=in_this_process) == 0
    return tmp_path, one
