"""What `pretrain status` says of runs in every state, and what it reads for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_pipeline.errors import InputError, RunError
from launch.jobs.cancel import cancel
from launch.jobs.record import load_job
from launch.jobs.run_state import find_state
from launch.jobs.status import find_runs, productive_share, run_status, show_status
from launch.slurm.commands import job_states
from pretrain.checkpoints.checkpoint import newest_sound
from pretrain.checkpoints.writer import CheckpointWriter
from pretrain.monitoring.timeline import Timeline
from pretrain.runtime.collectives import World
from pretrain.runtime.failure import forget_failure, note_failure
from pretrain.runtime.run_folder import complete_checkpoints, is_claimed
from pretrain.runtime.state import Progress, RunState
from tests.launch.run_folders import TOTAL_STEPS, Commands, Held, claimed, event, make_run, submit

ROOT = Path(__file__).resolve().parents[2]


def state(run: Path) -> str:
    job = load_job(run)
    return find_state(run, job, job_states([job.job_id]) if job is not None and job.job_id else {})


# Runs that were never submitted: the lock says who is at work.


def test_a_run_whose_folder_is_locked_is_running_and_asking_leaves_the_lock_alone(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", logged=4, saved=3)
    with claimed(run):
        assert is_claimed(run)
        assert is_claimed(run)
        assert state(run) == "running"
    assert state(run) == "stopped"


def test_a_run_is_done_when_its_last_step_is_in_a_checkpoint(tmp_path: Path) -> None:
    assert state(make_run(tmp_path / "done", logged=TOTAL_STEPS, saved=TOTAL_STEPS)) == "done"
    assert state(make_run(tmp_path / "lost", logged=TOTAL_STEPS, saved=TOTAL_STEPS - 1)) == "stopped"


# Submitted ones: the record, then SLURM.


@pytest.mark.parametrize(
    ("events", "in_queue", "expected"),
    [
        ([], "PENDING", "pending"),
        (["start"], "RUNNING", "running"),
        (["start"], "COMPLETING", "running"),
        (["start", "end", "requeue"], "COMPLETING", "requeued"),
        (["start", "end", "requeue"], "PENDING", "requeued"),
        (["start"], "PENDING", "requeued"),  # a node was lost: SLURM requeues by itself, and nobody writes it down
        (["start", "end", "requeue", "start"], "RUNNING", "running"),
        (["start", "end", "done"], "COMPLETING", "done"),
        (["start", "end", "stop"], "FAILED", "stopped"),
        (["start", "cancel", "end"], "RUNNING", "cancelled"),
        (["start"], "CANCELLED", "cancelled"),
        (["start"], "NODE_FAIL", "failed"),
        (["start", "end"], "COMPLETED", "failed"),
        ([], "FAILED", "failed"),
    ],
)
def test_the_state_of_a_job(
    tmp_path: Path, commands: Commands, events: list[str], in_queue: str, expected: str
) -> None:
    run = submit(make_run(tmp_path / "run", logged=2))
    for kind in events:
        event(run, kind)
    commands.says("squeue", f"7 {in_queue}")
    assert state(run) == expected


def test_a_job_that_the_queue_forgot_is_asked_of_the_accounts(tmp_path: Path, commands: Commands) -> None:
    run = submit(make_run(tmp_path / "run", logged=2))
    event(run, "start")
    commands.says("squeue", "slurm_load_jobs error: Invalid job id specified", status=1)
    assert state(run) == "failed"  # nobody knows of it
    commands.says("sacct", "7|CANCELLED by 1000")
    assert state(run) == "cancelled"


def test_without_an_answer_nothing_is_made_up(tmp_path: Path, commands: Commands) -> None:
    run = submit(make_run(tmp_path / "run", logged=2))
    event(run, "start")
    assert state(run) == "unknown"
    commands.says("squeue", "slurm_load_jobs error: Unable to contact slurm controller", status=1)
    assert state(run) == "unknown"
    with claimed(run):
        assert state(run) == "running"
    event(run, "stop", why="no progress between two requeues")
    assert state(run) == "stopped"


def test_a_new_submission_opens_a_stopped_run_and_late_words_of_the_earlier_job_are_not_its_own(
    tmp_path: Path, commands: Commands
) -> None:
    run = submit(make_run(tmp_path / "run", logged=2))
    event(run, "start")
    event(run, "stop", why="no progress")
    submit(run, "8")
    commands.says("squeue", "8 PENDING")
    assert state(run) == "pending"
    event(run, "stop", job_id="7", why="n0 did not see the run's folder")
    assert state(run) == "pending"
    event(run, "start", job_id="8")
    event(run, "stop", job_id="7", why="n1 was lost")
    commands.says("squeue", "8 RUNNING")
    assert state(run) == "running"
    event(run, "done", job_id="8")
    assert state(run) == "done"


def test_a_cancel_that_slurm_does_not_hear_is_remembered(tmp_path: Path, commands: Commands) -> None:
    run = submit(make_run(tmp_path / "run", logged=2))
    event(run, "start")
    commands.says("scontrol", "slurm_load_jobs error: Unable to contact slurm controller (connect failure)", status=1)
    with pytest.raises(RunError, match=r"connect failure.* what runs is not queued again"):
        cancel(run, now=False)
    job = load_job(run)
    assert job is not None
    assert job.unwanted


@pytest.mark.parametrize(
    ("job_id", "reason", "expected"),
    [
        (None, "", ("failed", "its submission was interrupted; submit it again")),
        (
            "7",
            "JobHeldUser",
            ("pending", "job 7 is held: the submission that queued it is at work, or was interrupted"),
        ),
        ("7", "Priority", ("pending", "-")),  # it was killed after the release
        ("7", "Nonsense", ("pending", "-")),
    ],
)
def test_a_submission_that_was_interrupted_is_told(
    tmp_path: Path, commands: Commands, job_id: str | None, reason: str, expected: tuple[str, str]
) -> None:
    run = submit(make_run(tmp_path / "run"), at=time.time() - 3600)
    path = run / "job" / "submitted.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "job_id": job_id, "released": False}))
    commands.says("squeue", "7 PENDING")
    commands.says("scontrol", f"JobId=7 JobState=PENDING Reason={reason} Dependency=(null)", when="show*7")
    if reason == "Nonsense":
        commands.says("scontrol", "no", status=1)
    job = load_job(run)
    assert job is not None
    found = run_status(run, job, job_states([job.job_id] if job.job_id else []))
    assert (found.state, (found.error or "-")[: len(expected[1])]) == expected
    event(run, "start")
    commands.says("scontrol", "JobId=7 JobState=PENDING Reason=JobHeldUser Dependency=(null)", when="show*7")
    if job_id:
        assert run_status(run, load_job(run), job_states(["7"])).error is None, "it is its user who holds it"


def test_clocks_of_two_machines_may_differ(tmp_path: Path, commands: Commands) -> None:
    run = submit(make_run(tmp_path / "run", logged=2), at=time.time() + 600)
    event(run, "start")
    commands.says("squeue", "7 PENDING")
    assert state(run) == "requeued"
    event(run, "stop")
    assert state(run) == "stopped"


def test_a_clock_that_goes_back_between_attempts_changes_no_choice(tmp_path: Path, commands: Commands) -> None:
    """Checkpoints go by their steps, attempts by their order: what the first attempt wrote seems to be of later."""
    run = submit(make_run(tmp_path / "run", logged=20, saved=15), at=time.time() + 7200)
    later = time.time() + 3600
    for path in (run / "checkpoints").rglob("*"):
        os.utime(path, (later, later))
    event(run, "start", job_id="7", at=later)
    event(run, "end", at=later, job_id="7")
    event(run, "requeue", at=later, job_id="7")
    event(run, "start", 1, job_id="7")
    commands.says("squeue", "7 RUNNING")
    writer = CheckpointWriter(run / "checkpoints", Held(), world=World(), keep_last=2, say=lambda _: None)
    for step in (18, 20):
        writer.save(RunState(Progress(step, TOTAL_STEPS, 8 * step)))
        writer.finish()
    found = run_status(run, load_job(run), job_states(["7"]))
    assert (found.state, found.checkpoint_step, found.requeues) == ("running", 20, 1)
    assert found.checkpoint_age_seconds is not None
    assert found.checkpoint_age_seconds >= 0
    assert [path.name for path in complete_checkpoints(run / "checkpoints")] == ["step_00000018", "step_00000020"]
    newest, unsound = newest_sound(run / "checkpoints", World())
    assert newest is not None
    assert (newest.path.name, unsound) == ("step_00000020", [])


def test_a_job_that_is_canceled_before_it_starts(tmp_path: Path, commands: Commands) -> None:
    run = submit(make_run(tmp_path / "run"))
    event(run, "cancel")
    commands.says("squeue", "7 PENDING")
    assert state(run) == "cancelled"


def test_a_job_of_the_local_executor_is_a_process(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    run = submit(make_run(tmp_path / "run"), str(process.pid), executor="local")
    assert state(run) == "pending"
    event(run, "start", job_id=str(process.pid))
    assert state(run) == "running"
    process.communicate(b"\n")
    assert state(run) == "failed"


# The numbers.


def test_the_numbers_of_a_run(tmp_path: Path, commands: Commands) -> None:
    run = submit(make_run(tmp_path / "run", logged=20, saved=15))
    for attempt in range(3):
        event(run, "start", attempt)
    event(run, "start", 3, job_id="8")  # a second submission is no requeue
    complete = run / "checkpoints" / "step_00000015" / "COMPLETE"
    os.utime(complete, (0, time.time() - 3600))
    with claimed(run):
        found = run_status(run, load_job(run), None)
    assert (found.step, found.total_steps, found.samples_per_second) == (20, TOTAL_STEPS, 120.0)
    assert found.eta_seconds == pytest.approx((TOTAL_STEPS - 20) * 8 / 120)
    assert found.checkpoint_step == 15
    assert found.checkpoint_age_seconds == pytest.approx(3600, abs=60)
    assert found.requeues == 2


def test_goodput_of_a_run_that_waits_falls(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    assert productive_share(run, "running") is None
    now = time.time() - 100
    clock = iter([now, now + 10, now + 40, now + 50])  # start-up until 10, a step until 40, then the end
    timeline = Timeline(run, step=0, active=True, clock=lambda: next(clock), started=now)
    timeline.mark(1, "data")
    timeline.mark(1, "step")
    timeline.end(finished=True)
    over, waiting = productive_share(run, "stopped"), productive_share(run, "requeued")
    assert over is not None
    assert waiting is not None
    assert 0 < waiting < 0.6 * over


def test_steps_between_the_last_logged_one_and_a_save_count(tmp_path: Path) -> None:
    """A run that is asked to stop saves where it is, which is seldom a step that is logged."""
    assert run_status(make_run(tmp_path / "run", logged=20, saved=24), None, {}).step == 24


def test_a_torn_checkpoint_does_not_count(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", logged=20, saved=15)
    (run / "checkpoints" / "step_00000020").mkdir()
    assert run_status(run, None, {}).checkpoint_step == 15


def test_the_last_error_is_the_newest_line_that_tells_of_one(tmp_path: Path, commands: Commands) -> None:
    run = submit(make_run(tmp_path / "run", logged=2))
    event(run, "start")
    event(run, "stop", why="no progress between two requeues")
    assert run_status(run, load_job(run), {}).error == "no progress between two requeues"
    log = run / "job" / "slurm" / "7_1_log.err"
    log.write_text("[rank 2] ValueError: x\nerror: rank 3 was killed by SIGKILL; the others were stopped\nstep 4\n")
    (run / "job" / "slurm" / "7_0_log.out").write_text("step 4 loss 2\n")
    assert run_status(run, load_job(run), {}).error == "error: rank 3 was killed by SIGKILL; the others were stopped"


def test_what_a_full_disk_did_not_take_was_left_with_slurm(tmp_path: Path, commands: Commands) -> None:
    run = submit(tmp_path / "run")
    commands.says("squeue", "7 FAILED")
    commands.says("scontrol", "JobId=7 JobName=r\n   Comment=pretrain: stop: no more room\n   Power=")
    found = run_status(run, load_job(run), job_states(["7"]))
    assert (found.state, found.error) == ("failed", "stop: no more room")
    commands.says("scontrol", "slurm_load_jobs error: Invalid job id specified", status=1)
    commands.says("sacct", "pretrain: stop: as the accounts have it")
    assert run_status(run, load_job(run), job_states(["7"])).error == "stop: as the accounts have it"


def test_a_run_that_failed_here_says_why_until_it_is_begun_again(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", logged=5, saved=5)
    note_failure(run, "loader worker: expected\na process, found none.", rank=1, trace="Traceback\n")
    note_failure(run, "connection closed by peer", rank=0)
    found = run_status(run, None, None)
    assert (found.state, found.error) == ("failed", "loader worker: expected a process, found none.")
    log = (run / "log-rank0.txt").read_text()
    assert log.endswith("Traceback\nerror: loader worker: expected\na process, found none.\n")
    forget_failure(run)
    assert run_status(run, None, None).state == "stopped"


def test_of_a_large_log_the_end_alone_is_read(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", logged=3)
    tail = (run / "metrics.jsonl").read_text()
    with (run / "metrics.jsonl").open("w") as file:
        file.truncate(1 << 36)  # a hole of 64 GB
        file.seek(0, os.SEEK_END)
        file.write(f"\n{tail}" + '{"step": 4, "images_')
    assert run_status(run, None, {}).step == 3


# The command.


def test_the_table_and_the_json_tell_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    submit(make_run(tmp_path / "runs" / "a", logged=20, saved=15))
    event(tmp_path / "runs" / "a", "stop")
    make_run(tmp_path / "runs" / "chain" / "b", logged=TOTAL_STEPS, saved=TOTAL_STEPS)
    (tmp_path / "runs" / "notes").mkdir()
    capsys.readouterr()
    show_status([tmp_path / "runs"])
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split()[:3] == ["run", "state", "step"]
    assert [row.split()[1:4] for row in rows] == [["stopped", "20/30", "120"], ["done", "30/30", "130"]]
    show_status([tmp_path / "runs"], as_json=True)
    assert [(row["state"], row["step"]) for row in json.loads(capsys.readouterr().out)] == [
        ("stopped", 20),
        ("done", 30),
    ]


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected the folder of a run, with recipe\.yaml or .* found none in it"):
        find_runs(tmp_path)
    with pytest.raises(InputError, match="found no such folder"):
        find_runs(tmp_path / "nowhere")


def test_it_answers_without_torch(tmp_path: Path) -> None:
    run = submit(make_run(tmp_path / "run", logged=20, saved=15), executor="local", job_id="1")
    code = (
        "import sys\nfrom pathlib import Path\nfrom launch.jobs.status import show_status\n"
        f"show_status([Path({str(run)!r})])\nprint('loaded:', *sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert not {"torch", "numpy", "pydantic"} & set(done.stdout.rsplit("loaded:", 1)[1].split())
