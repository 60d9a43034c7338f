"""What clusters do to jobs, done to a real one: each run ends by itself, equal to the uninterrupted one to the bit.

Several things are done to one run, one after another, each to another attempt: what costs time is the start of ranks.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from contextlib import suppress
from datetime import datetime

import pytest

from launch.jobs.cancel import cancel
from launch.jobs.folder import JobFolder
from pretrain.runtime.signals import HUNG, STOPPED
from tests.runs import losses
from tests.slurm.jobs import SAVED_EVERY, Place

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.mark.seconds(90)
def test_a_warning_a_termination_and_an_operators_requeue(place: Place, expected: dict[int, float]) -> None:
    """The warning of a job of ten minutes, which submitit by itself takes for timed out, beside files that its requeue
    dies of; a termination, as at a preemption; and an operator's requeue in the middle of a save.
    """
    job = place.submit("warned", gates=(40, 60, 80))
    job.held(40)
    for path in JobFolder(job.run).logs.glob("*.pkl"):
        path.with_name(f"{path.name}.save_tmp").write_bytes(b"half")
    place.cluster.run("scancel", "--signal=USR2", job.job_id)
    job.release(40)
    job.held(60)
    place.cluster.run("scancel", "--signal=TERM", job.job_id)
    job.release(60)
    job.held(80)
    place.cluster.run("scontrol", "requeue", job.job_id)
    job.release(80)
    job.wait_until_over()
    job.check_whole(expected)
    job.check_requeued(times=3)
    warned, terminated, _, *_ = job.ends()
    assert warned["status"] == terminated["status"] == STOPPED
    assert 40 <= warned["step"] < 60, "it saved at the warning, not before"
    assert 60 <= terminated["step"] < 80, "it saved at the termination, not before"


@pytest.mark.seconds(110)
def test_the_time_limit_itself(place: Place, expected: dict[int, float]) -> None:
    """Ranks that do not answer when the time is over: they are killed while there is time to queue the job again."""
    job = place.submit("limited", gates=(40,), signal_lead_seconds=1)
    job.held(40)
    ranks, over = job.rank_pids(), threading.Event()

    def keep_still() -> None:
        """SLURM has them go on, to hear its signal."""
        while not over.wait(0.001):
            for pid in ranks:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGSTOP)

    thread = threading.Thread(target=keep_still)
    thread.start()
    limit = int(time.time()) + 3  # limits of new jobs are whole minutes, but those of running ones may be moved
    end = datetime.fromtimestamp(limit).isoformat()
    place.cluster.run("scontrol", "update", f"JobId={job.job_id}", f"EndTime={end}")
    try:
        job.wait(lambda: "end" in job.events(), what="the end of the first attempt")
    finally:
        over.set()
        thread.join()
    job.release(40)
    job.wait(lambda: "requeue" in job.events(), what="its return to the queue", state=lambda state: state == "PENDING")
    place.cluster.run("scontrol", "update", f"JobId={job.job_id}", "TimeLimit=10")
    job.wait_until_over()
    job.check_whole(expected)
    job.check_requeued()
    first = job.ends()[0]
    assert first["at"] > limit, "nobody ended it before"
    assert first["step"] == 40 - SAVED_EVERY, "the last periodic checkpoint serves"


@pytest.mark.seconds(70)
def test_a_rank_that_is_killed_and_one_that_hangs(place: Place, expected: dict[int, float]) -> None:
    # Longer than SLURM's KillWait: it has the stopped rank go on, to hear its signal, and kills it before the patience
    # of that rank is over, which would name those that have ended meanwhile.
    job = place.submit("killed", "--set", "runtime.step_timeout_seconds=20", gates=(40, 60))
    job.held(40)
    os.kill(job.rank_pid(1), signal.SIGKILL)
    job.release(40)
    job.held(60)
    os.kill(job.rank_pid(1), signal.SIGSTOP)
    job.release(60)
    job.wait_until_over()
    job.check_whole(expected)
    job.check_requeued(times=2)
    killed, hung, *_ = job.ends()
    assert killed["status"] == 128 + signal.SIGKILL
    assert killed["step"] % SAVED_EVERY == 0
    assert hung["status"] == HUNG
    assert "rank 1 on n1 has made no progress" in hung["why"]
    named = [line for line in job.log().splitlines() if line.startswith("rank ") and "has made no progress" in line]
    assert named
    assert all(line.startswith("rank 1 on n1 ") for line in named)


@pytest.mark.seconds(45)
def test_a_full_disk_stops_the_run_which_goes_on_when_there_is_room(place: Place, expected: dict[int, float]) -> None:
    checkpoints = place.folder / "full" / "checkpoints"
    checkpoints.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200K", "none", str(checkpoints)], check=True)
    try:
        job = place.submit("full")
        job.wait_until_over()
        assert job.events() == ["start", "end", "stop"], job.told()
        assert "No space left on device" in job.log()
        subprocess.run(["mount", "-o", "remount,size=64M", str(checkpoints)], check=True)
        job = place.submit("full")
        job.wait_until_over()
        job.check_whole(expected)
    finally:
        subprocess.run(["umount", "--lazy", str(checkpoints)], check=True)


@pytest.mark.seconds(75)
def test_each_node_is_lost_in_turn(place: Place, expected: dict[int, float]) -> None:
    job = place.submit("lost", gates=(40, 60))
    for step, node in ((40, "n0"), (60, "n1")):
        job.held(step)
        place.cluster.lose(node)
        job.release(step)
        job.wait(what="its return to the queue", state=lambda state: state in ("PENDING", "REQUEUED"))
        place.cluster.start_slurmd(node)
    job.wait_until_over()
    job.check_whole(expected)
    assert job.events().count("start") == 3, job.told()


@pytest.mark.seconds(45)
def test_another_number_of_nodes(place: Place, expected: dict[int, float]) -> None:
    """Cancelled, which saves, and submitted again on one node; the global batch stays."""
    job = place.submit("elastic", gates=(40,))
    job.held(40)
    with place.cluster.spoken_to():
        cancel(job.run, now=False)
    job.release(40)
    job.wait_until_over()
    assert job.events() == ["start", "end", "cancel"]
    saved = job.last("end")["step"]
    assert 40 <= saved < len(expected)
    again = place.submit("elastic", "--nodes", "1")
    again.wait_until_over()
    assert again.events()[-1] == "done", again.told()
    found = losses(job.run)
    assert sorted(found) == sorted(expected)
    assert all(found[step] == expected[step] for step in range(1, saved + 1))
    assert all(found[step] == pytest.approx(expected[step], rel=1e-4) for step in found)


@pytest.mark.seconds(25)
def test_a_run_without_progress_stops_and_says_so(place: Place) -> None:
    job = place.submit("stuck", gates=(SAVED_EVERY,))
    job.held(SAVED_EVERY)
    os.kill(job.rank_pid(0), signal.SIGKILL)
    job.release(SAVED_EVERY)
    job.wait_until_over()
    assert job.events() == ["start", "end", "stop"], job.told()
    assert "without a new checkpoint since step 0" in job.last("stop")["why"]
