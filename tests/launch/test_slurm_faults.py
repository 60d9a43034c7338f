"""SLURM's commands missing, hanging, failing or talking nonsense: what asks them says so, and goes on without."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import RunError
from launch.jobs.status import show_status
from launch.slurm import commands as slurm_commands
from launch.slurm.checks import check_slurm
from launch.slurm.commands import job_states, kill_wait_seconds, shorten_requeue_delay, slurm
from tests.launch.findings import asked, levels
from tests.launch.run_folders import Commands, event, make_run, submit

NAMES = ("squeue", "sacct", "sinfo", "sacctmgr", "scontrol")
NONSENSE = {
    "other words": "Segmentation fault\n:::\n| |||\n7\n7 \n\n= == 7=8=9 \n7 <html>\n7|<html>\n1 2 3 4 5 6 7\n",
    "numbers": "7 64\n6 x y gpu\n7|12|13|14\n8 ?\n",
    "no words": "",
    "no text": "\\377\\376\\000\\001 7 \\200\\n7|\\300\\n",
}
FAULTS = ("missing", "hanging", "failing", "no program", "a folder", *NONSENSE)


@pytest.fixture(params=[(name, fault) for name in NAMES for fault in FAULTS], ids=lambda pair: " ".join(pair))
def broken(request: pytest.FixtureRequest, cluster: Commands, monkeypatch: pytest.MonkeyPatch) -> str:
    """A cluster one of whose commands has a fault; its name."""
    name, fault = request.param
    path = cluster.folder / name
    if fault in NONSENSE:
        text = NONSENSE[fault].replace("\n", "\\n")
        path.write_text(f"#!/bin/sh\nprintf '{text}'\n")
        path.chmod(0o755)
    elif fault == "failing":
        cluster.says(name, "slurm_load_jobs error: Unable to contact slurm controller", status=1)
    else:
        path.unlink()
    if fault == "no program":
        path.write_bytes(b"\x7fELF no program")
        path.chmod(0o755)
    elif fault == "a folder":
        path.mkdir()
    elif fault == "hanging":
        run = subprocess.run

        def hang(words: Any, **options: Any) -> Any:
            if words[0] == name:
                raise subprocess.TimeoutExpired(words, options["timeout"])
            return run(words, **options)

        path.touch(0o755)
        monkeypatch.setattr(slurm_commands.subprocess, "run", hang)
    return str(name)


def test_what_asks_slurm_says_what_is_wrong_and_goes_on(
    broken: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = submit(make_run(tmp_path / "run", logged=3))
    event(run, "start")
    found = list(check_slurm(asked(account="vision", qos="high")))
    assert found
    assert all(str(finding) for finding in found)
    states = job_states(["7", "8"])
    assert states is None or set(states) <= {"7", "8"}
    assert all(state.isupper() for state in (states or {}).values()), "nonsense is no state"
    assert kill_wait_seconds() == 30
    capsys.readouterr()
    show_status([run], as_json=True)
    (shown,) = json.loads(capsys.readouterr().out)
    assert shown["step"] == 3
    if broken != "squeue":
        assert states == {}


def test_what_is_no_list_of_nodes_refuses_no_job(cluster: Commands) -> None:
    cluster.says("sinfo", "7 64\n6 x y gpu\nsinfo: bad")
    assert ("warning", "nodes") in levels(check_slurm(asked()))


def test_a_time_that_is_none_shortens_no_delay(commands: Commands) -> None:
    commands.says("scontrol", "it was asked", status=1)
    job = {"JobId": "7", "Reason": "BeginTime"}
    with pytest.raises(RunError, match="it was asked"):
        shorten_requeue_delay({**job, "EligibleTime": "2999-01-01T00:00:00"})
    for begin in ("N/A", "Unknown", ""):
        shorten_requeue_delay({**job, "EligibleTime": begin})


def test_a_command_that_does_not_end_is_ended(commands: Commands) -> None:
    (commands.folder / "squeue").write_text("#!/bin/sh\nwhile :; do :; done\n")
    (commands.folder / "squeue").chmod(0o755)
    with pytest.raises(RunError, match="an answer within"):
        slurm("squeue", seconds=0.1)
