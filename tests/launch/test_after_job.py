"""What becomes of a job, from what its nodes left and what SLURM says of it."""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import InputError, RunError
from launch.jobs import after_job, job
from launch.jobs.after_job import Ending, decide, ending, is_canceled, is_queued
from launch.jobs.folder import JobFolder
from launch.jobs.node import MAX_ATTEMPTS_WITHOUT_CHECKPOINT, Node, attempt_folder
from launch.jobs.rendezvous import host_rendezvous, refuse_more_requeues
from pretrain.runtime.run_folder import COMPLETE, folder_name
from pretrain.runtime.signals import HUNG, STOPPED
from tests.launch.run_folders import Commands, submit

NODES = ["n0", "n1"]


def of(*statuses: int | None, joined: int = 2, srun: int = 1) -> Ending:
    """Of nodes with these statuses; None: it left no report."""
    pairs = zip(NODES, statuses, strict=True)
    reports = {node: {"status": status, "why": ""} for node, status in pairs if status is not None}
    return ending(reports, set(NODES[:joined]), NODES, srun)


@pytest.mark.parametrize(
    ("statuses", "status", "said"),
    [
        ((0, 0), 0, "done"),
        ((STOPPED, STOPPED), STOPPED, "asked to stop"),
        ((0, STOPPED), STOPPED, "asked to stop"),
        ((STOPPED, 1), 1, "the run failed (n1)"),  # n0 was asked to stop because of it
        ((1, 137), 137, "a rank was killed by SIGKILL (perhaps for want of memory) (n1)"),  # whose peers failed of it
        ((1, HUNG), HUNG, "no progress (n1)"),
        ((137, HUNG), HUNG, "no progress (n1)"),
        ((HUNG, None), HUNG, "no progress (n0)"),
        ((2, 1), 2, "wrong input"),
        ((1, None), 1, "n1 was lost"),
        ((0, None), 1, "n1 was lost"),
    ],
)
def test_what_failed_by_itself_is_named(statuses: tuple[int | None, ...], status: int, said: str) -> None:
    end = of(*statuses)
    assert end.status == status
    assert said in end.why


def test_a_node_that_was_never_there_does_not_see_the_folder_unless_it_was_ended_first() -> None:
    assert of(1, None, joined=1, srun=1) == Ending(2, "n1 did not see the run's folder, or could not start Python")
    assert of(STOPPED, None, joined=1, srun=143).status == 1


def then(status: int, **given: Any) -> str:
    known = {"restart": 0, "max_requeues": 3, "canceled": False, "queued": False, "step": 20, "without_checkpoint": 0}
    found = decide(Ending(status, "it ended"), **{**known, **given})
    assert found.event in ("done", "cancel") or "it ended" in found.why
    return found.event


@pytest.mark.parametrize("status", [1, STOPPED, HUNG, 137])
def test_it_is_queued_again_as_long_as_it_gets_further_and_may(status: int) -> None:
    assert then(status) == "requeue"
    assert then(status, restart=3) == "stop"
    assert then(status, without_checkpoint=1) == "stop"
    assert then(status, canceled=True) == "cancel"
    assert then(status, queued=True, without_checkpoint=1) == "requeue"  # nobody's fault, and done already
    assert then(status, queued=True, canceled=True) == "cancel"


@pytest.mark.parametrize(
    ("status", "event"), [(STOPPED, "requeue"), (1, "stop"), (137, "stop"), (2, "stop"), (0, "done")]
)
def test_a_command_that_goes_on_is_queued_again_where_it_was_asked_to_stop(status: int, event: str) -> None:
    assert then(status, command=["data", "label", "shards"], step=0, without_checkpoint=1) == event
    assert then(STOPPED, command=["eval", "finetune", "--out"], step=0, without_checkpoint=1) == "requeue"
    assert then(STOPPED, command=["data", "label"], restart=3) == "stop"
    assert then(STOPPED, command=["data", "label"], canceled=True) == "cancel"
    assert then(STOPPED, command=["eval", "knn"]) == "stop", "it would begin again, and come no further"
    assert then(STOPPED, command=["eval", "knn"], queued=True) == "requeue"


def test_done_and_wrong_input_are_never_queued_again() -> None:
    assert then(0, without_checkpoint=1, canceled=True) == "done"
    assert then(2) == "stop"


def test_input_that_was_right_before_is_tried_again_a_few_times() -> None:
    """A node that is slow to show the folder, or whose mount of the data is gone, must not end a run of weeks."""
    most = MAX_ATTEMPTS_WITHOUT_CHECKPOINT
    assert [then(2, restart=2, without_checkpoint=number) for number in (1, most - 1, most)] == [
        "requeue", "requeue", "stop",
    ]  # fmt: skip
    assert then(2, restart=3, without_checkpoint=1) == "stop", "max_requeues"


def test_what_slurm_says_of_a_job_that_it_ends() -> None:
    """As SLURM 22.05 said it, seen in the teardown of a batch script after each of these."""
    requeued = {"JobState": "COMPLETING", "Reason": "None", "Restarts": "1"}
    canceled = {"JobState": "COMPLETING", "Reason": "None", "Restarts": "0"}
    timed_out = {"JobState": "COMPLETING", "Reason": "TimeLimit", "Restarts": "0"}
    signalled = {"JobState": "RUNNING", "Reason": "None", "Restarts": "0"}
    assert [is_queued(fields, 0) for fields in (requeued, canceled, timed_out, signalled)] == [
        True,
        False,
        False,
        False,
    ]
    assert [is_canceled(fields, 0) for fields in (requeued, canceled, timed_out, signalled)] == [
        False, True, False, False,
    ]  # fmt: skip


def saved(run: Path, step: int) -> None:
    folder = run / "checkpoints" / folder_name(step)
    folder.mkdir(parents=True)
    (folder / COMPLETE).write_text("")


@pytest.fixture
def run(tmp_path: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A job on one node that began at step 10, saved step 20, and was asked to stop."""
    run = submit(tmp_path / "run")
    (run / "job" / "cluster.yaml").write_text("max_requeues: 3\n")
    saved(run, 10)
    JobFolder(run).note("start", attempt=0, job_id="7", nodes=["n0"], restart=0, step=10)
    saved(run, 20)
    left = attempt_folder(run, "7", 0)
    left.mkdir(parents=True)
    (left / "n0.joined").touch()
    (left / "n0.json").write_text(json.dumps({"status": STOPPED, "why": "", "at": 0.0}))
    for name, value in (("SLURM_JOB_ID", "7"), ("SLURMD_NODENAME", "n0"), ("SLURM_RESTART_COUNT", "0")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(after_job.time, "sleep", lambda _: None)
    commands.says("scontrol", "JobId=7 JobState=RUNNING Restarts=0", when="show*7")
    commands.says("scontrol", when="requeue*7")
    return run


def said(run: Path) -> list[tuple[str, str]]:
    return [(event["event"], event.get("why", "")) for event in JobFolder(run).events()[1:]]


def test_what_got_further_is_queued_again(run: Path) -> None:
    assert after_job.main(run, 1) == STOPPED
    assert said(run) == [("end", "asked to stop (n0)"), ("requeue", "asked to stop (n0)")]


def test_a_controller_that_is_busy_is_asked_again(
    run: Path, monkeypatch: pytest.MonkeyPatch, commands: Commands
) -> None:
    busy = "slurm_load_jobs error: Socket timed out on send/recv operation"
    commands.says("scontrol", busy, status=1)

    def answers(_: float) -> None:
        commands.says("scontrol", "JobId=7 JobState=RUNNING Restarts=0", when="show*7")
        commands.says("scontrol", when="requeue*7")

    monkeypatch.setattr(after_job.time, "sleep", answers)
    assert after_job.main(run, 1) == STOPPED
    assert [event for event, _ in said(run)] == ["end", "requeue"]


def test_what_slurm_did_without_saying_so_in_time_counts(run: Path, commands: Commands) -> None:
    commands.says("scontrol", "Socket timed out on send/recv operation", status=1, when="requeue*7")
    commands.says("scontrol", "JobId=7 JobState=PENDING Restarts=1", when="show*7")
    assert after_job._requeue(Node("n0", 0, 1, "7", 0))
    with pytest.raises(RunError, match="timed out"):
        after_job._requeue(Node("n0", 0, 1, "7", 1))


def test_a_controller_that_never_answers_is_told_of(
    run: Path, monkeypatch: pytest.MonkeyPatch, commands: Commands
) -> None:
    commands.says("scontrol", "Socket timed out", status=1)
    monkeypatch.setattr(after_job, "_PATIENCE_SECONDS", 0)
    assert after_job.main(run, 1) == 1
    assert [event for event, _ in said(run)] == ["end", "stop"]
    assert "SLURM did not queue it again" in said(run)[-1][1]


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def acts(run: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the end of the job of a run on a full disk does, in its order; its log is on that disk too."""
    acts: list[str] = []

    def refused(*_: object, **__: object) -> None:
        acts.append("word")
        raise FULL

    monkeypatch.setattr("launch.jobs.folder.append_line", refused)
    monkeypatch.setattr(after_job, "write_text", refused)
    monkeypatch.setattr(after_job, "_requeue", lambda node: acts.append("requeue") or True)
    monkeypatch.setattr(after_job, "comment", lambda job_id, words: acts.append(f"comment on {job_id}: {words}"))
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, open("/dev/full", "w"))  # noqa: SIM115
    return acts


def test_a_full_disk_takes_no_requeue_with_it(run: Path, acts: list[str]) -> None:
    assert after_job.main(run, 1) == STOPPED
    assert acts[0] == "requeue"
    assert acts[-1] == "comment on 7: requeue: asked to stop (n0)"
    sys.stdout.flush()  # as Python does at its end: no other exit status comes of it


def test_one_that_was_full_from_the_start_says_so_and_is_tried_again(run: Path, acts: list[str]) -> None:
    left = attempt_folder(run, "7", 0)
    for path in left.iterdir():
        path.unlink()
    assert after_job.main(run, 1) == 1
    assert acts[:2] == ["word", "requeue"], "the first is to see whether the folder takes any"
    assert acts[-1] == f"comment on 7: requeue: {run} takes no more files: No space left on device"


def test_a_node_on_a_full_disk_says_so(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def refused(*_: object) -> None:
        raise FULL

    monkeypatch.setattr(job, "verify_shared_folder", refused)
    monkeypatch.setattr(job, "write_text", refused)
    assert job.run_node(run, "token") == 1
    said = capsys.readouterr().err
    assert f"error: {run} on n0: [Errno 28] No space left on device" in said
    assert "takes no word of how n0 ended" in said


def test_progress_is_that_of_the_job(run: Path) -> None:
    """An earlier submission had come to step 5000, whose checkpoints its user then removed."""
    JobFolder(run).note("start", attempt=1, job_id="6", nodes=["n0"], restart=0, step=5000)
    JobFolder(run).note("end", attempt=1, status=1, why="", step=5000)
    assert after_job.main(run, 1) == STOPPED
    assert said(run)[-1][0] == "requeue"


def attempt(run: Path, restart: int) -> None:
    folder = JobFolder(run)
    folder.note("start", attempt=restart, job_id="7", nodes=["n0"], restart=restart, step=folder.newest_step())
    refuse_more_requeues(folder, Node("n0", 0, 1, "7", restart))


def test_a_job_that_starts_although_it_was_canceled_ends_at_once(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SLURM did not hear of it, or has queued the job again by itself."""
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    JobFolder(run).canceled.touch()
    assert job.run_node(run, JobFolder(run).submitted().get("token")) == 2
    assert "a job that is wanted" in json.loads((attempt_folder(run, "7", 1) / "n0.json").read_text())["why"]
    assert after_job.main(run, 1) == 2
    assert said(run)[-1] == ("cancel", "canceled at step 20")
    JobFolder(run).canceled.unlink()  # as the next submission does
    assert not host_rendezvous(JobFolder(run), Node("n0", 0, 1, "7", 1), done=False).done


def test_what_slurm_itself_queues_again_is_bounded(run: Path) -> None:
    """As after the loss of the first node, where nobody decides; and a run may be what kills its nodes."""
    attempt(run, 1)
    attempt(run, 2)
    attempt(run, 3)
    with pytest.raises(InputError, match=r"within 3 attempts, found none since step 20"):
        attempt(run, 3)
    saved(run, 30)
    attempt(run, 3)
    with pytest.raises(InputError, match=r"at most 3 requeues \(max_requeues\), found 4"):
        attempt(run, 4)


def test_a_command_has_no_checkpoints_to_be_counted_by(run: Path) -> None:
    JobFolder(run).write("submitted.json", json.dumps({"job_id": "7", "words": ["data", "label"]}))
    for _ in range(5):
        attempt(run, 3)
