"""One submission at a time queues one job, whoever is killed between any two of its steps."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import ExitStack

import pytest

from launch.jobs.folder import JobFolder
from tests.slurm.jobs import Place

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

# Kills the submission that calls it, before or after it has done what it is called for.
KILLER = """#!/bin/sh
case "{program} $*" in *--test-only*) exec {program} "$@";; *sbatch*|*" release "*) ;; *) exec {program} "$@";; esac
if [ {when} = before ]; then kill -9 $PPID; exit 1; fi
{program} "$@"
kill -9 $PPID
"""


def queued(place: Place) -> list[list[str]]:
    """Number, state and reason of every job in the queue."""
    lines = place.cluster.run("squeue", "--noheader", "--format=%A %T %r").splitlines()
    return [line.split() for line in lines]


@pytest.mark.seconds(20)
def test_of_submissions_at_once_one_queues_a_job(place: Place) -> None:
    file = place.cluster_file(nodes=1, sbatch={"begin": "now+1hour"})
    words = ("submit", "recipe.yaml", "--cluster", str(file), "--out", "run")
    with ExitStack() as stack:
        commands = [stack.enter_context(place.begun(*words)) for _ in range(3)]
        said = [command.communicate(timeout=300)[0] for command in commands]
    assert sorted(command.returncode for command in commands) == [0, 2, 2], said
    refused = [text for command, text in zip(commands, said, strict=True) if command.returncode]
    assert all("another that is at work" in text or "expected a run without a job" in text for text in refused), said
    [(job_id, state, reason)] = queued(place)
    assert state == "PENDING"
    assert reason != "JobHeldUser"
    assert JobFolder(place.folder / "run").submitted()["job_id"] == job_id
    place.pretrain("cancel", "run")


@pytest.mark.seconds(25)
@pytest.mark.parametrize(
    ("program", "when", "left"),
    [("sbatch", "before", 0), ("sbatch", "after", 1), ("scontrol", "before", 1), ("scontrol", "after", 1)],
)
def test_a_submission_that_was_killed_is_mended_by_the_next(
    place: Place, program: str, when: str, left: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once before and after the job is queued, and before and after it is released."""
    file = place.cluster_file(nodes=1, sbatch={"begin": "now+1hour"})
    words = ("submit", "recipe.yaml", "--cluster", str(file), "--out", "run")
    with monkeypatch.context() as patch:
        killers = place.folder / "killers"
        killers.mkdir()
        (killers / program).write_text(KILLER.format(program=shutil.which(program), when=when))
        (killers / program).chmod(0o755)
        patch.setenv("PATH", f"{killers}:{os.environ['PATH']}")
        assert place.pretrain(*words, check=False).returncode == -9
    released = (program, when) == ("scontrol", "after")
    assert (" is held: " in place.pretrain("status", "run").stdout) == ((program, when) == ("scontrol", "before"))
    assert [reason == "JobHeldUser" for _, _, reason in queued(place)] == [not released] * left
    again = place.pretrain(*words, check=False)
    if released:
        assert again.returncode == 2
        assert "expected a run without a job" in again.stderr
    else:
        assert again.returncode == 0, again.stderr
        assert ("is taken out of the queue" in again.stdout) == (left == 1)
    [(job_id, state, reason)] = queued(place)
    assert state == "PENDING"
    assert reason != "JobHeldUser"
    submitted = json.loads((place.folder / "run" / "job" / "submitted.json").read_text())
    assert submitted["job_id"] == job_id
    assert len(list((place.folder / "run" / "code").iterdir())) == 1
    place.pretrain("cancel", "run")
