"""What clusters do to jobs, done to a real one: each run ends by itself, equal to the uninterrupted one to the bit."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from launch.jobs.cancel import cancel
from launch.jobs.folder import JobFolder
from pretrain.runtime.signals import HUNG
from tests.slurm.cluster import SlurmCluster
from tests.slurm.jobs import SAVED_EVERY, Place

pytestmark = pytest.mark.slow


def test_a_warning_of_the_time_limit(place: Place, expected: dict[int, float]) -> None:
    """Of a job of ten minutes, which submitit by itself takes for timed out, beside files that its requeue dies of."""
    job = place.submit("warned")
    job.wait_for_step(50)
    for path in JobFolder(job.run).logs.glob("*.pkl"):
        path.with_name(f"{path.name}.save_tmp").write_bytes(b"half")
    place.cluster.run("scancel", "--signal=USR2", job.job_id)
    job.wait_until_over()
    job.check_whole(expected)
    job.check_requeued()
    first = JobFolder(job.run).events()[1]
    assert first["status"] == 75
    assert first["step"] >= 50, "it saved at the warning, not before"


def test_the_time_limit_itself(place: Place, expected: dict[int, float]) -> None:
    """Ranks that do not answer when the time is over: they are killed while there is time to queue the job again."""
    job = place.submit("limited", time_minutes=2, signal_lead_seconds=1)
    job.wait_for_step(50)
    ranks, over = job.rank_pids(), threading.Event()

    def keep_still() -> None:
        """SLURM has them go on, to hear its signal."""
        while not over.wait(0.001):
            for pid in ranks:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGSTOP)

    thread = threading.Thread(target=keep_still)
    thread.start()
    try:
        job.wait(lambda: "end" in job.events(), what="the end of the first attempt")
    finally:
        over.set()
        thread.join()
    job.wait(lambda: job.events().count("start") == 2, what="the second attempt")
    place.cluster.run("scontrol", "update", f"JobId={job.job_id}", "TimeLimit=10")  # a slow machine's goes on in peace
    job.wait_until_over()
    job.check_whole(expected)
    job.check_requeued()
    events = JobFolder(job.run).events()
    assert events[1]["at"] - events[0]["at"] > 90, "nobody ended it before"
    assert events[1]["step"] % SAVED_EVERY == 0, "the last periodic checkpoint serves"


def test_preempted_by_a_termination(place: Place, expected: dict[int, float]) -> None:
    job = place.submit("terminated")
    job.wait_for_step(50)
    place.cluster.run("scancel", "--signal=TERM", job.job_id)
    job.wait_until_over()
    job.check_whole(expected)
    job.check_requeued()
    assert JobFolder(job.run).events()[1]["step"] >= 50


def test_a_rank_that_is_killed(place: Place, expected: dict[int, float]) -> None:
    job = place.submit("killed")
    job.wait_for_step(50)
    os.kill(job.rank_pid(1), signal.SIGKILL)
    job.wait_until_over()
    job.check_whole(expected)
    job.check_requeued()
    assert JobFolder(job.run).events()[1]["step"] % SAVED_EVERY == 0


def test_a_rank_that_hangs_is_named(place: Place, expected: dict[int, float]) -> None:
    job = place.submit("hung", "--set", "runtime.step_timeout_seconds=20")
    job.wait_for_step(50)
    os.kill(job.rank_pid(1), signal.SIGSTOP)
    job.wait_until_over()
    job.check_whole(expected)
    job.check_requeued()
    first = JobFolder(job.run).events()[1]
    assert first["status"] == HUNG
    assert "rank 1 on n1 has made no progress" in first["why"]
    named = [line for line in job.log().splitlines() if line.startswith("rank ") and "has made no progress" in line]
    assert named
    assert all(line.startswith("rank 1 on n1 ") for line in named)


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


@pytest.mark.parametrize("node", ["n0", "n1"])
def test_a_node_that_is_lost(place: Place, expected: dict[int, float], node: str) -> None:
    job = place.submit(f"lost-{node}")
    job.wait_for_step(50)
    place.cluster.lose(node)
    job.wait(
        lambda: place.cluster.job(job.job_id)["JobState"] in ("PENDING", "REQUEUED"), what="its return to the queue"
    )
    place.cluster.start_slurmd(node)
    job.wait_until_over()
    job.check_whole(expected)


def test_requeued_by_an_operator_during_a_save(place: Place, expected: dict[int, float]) -> None:
    job = place.submit("in-a-save")
    job.wait_for_step(SAVED_EVERY + 5)
    folder = job.run / "checkpoints"
    known = set(folder.iterdir())
    while not (new := set(folder.iterdir()) - known):
        pass
    place.cluster.run("scontrol", "requeue", job.job_id)
    assert new
    job.wait_until_over()
    job.check_whole(expected)
    assert job.events().count("start") >= 2


def test_another_number_of_nodes(place: Place, expected: dict[int, float]) -> None:
    """Cancelled, which saves, and submitted again on one node; the global batch stays."""
    job = place.submit("elastic")
    job.wait_for_step(50)
    with place.cluster.spoken_to():
        cancel(job.run, now=False)
    job.wait_until_over()
    assert job.events() == ["start", "end", "cancel"]
    saved = job.last("end")["step"]
    assert saved >= 50
    again = place.submit("elastic", "--nodes", "1")
    again.wait_until_over()
    assert again.events()[-1] == "done", again.told()
    from tests.runs import losses

    found = losses(job.run)
    assert sorted(found) == sorted(expected)
    assert all(found[step] == expected[step] for step in range(1, saved + 1))
    assert all(found[step] == pytest.approx(expected[step], rel=1e-4) for step in found)


def test_a_run_without_progress_stops_and_says_so(place: Place, cluster: SlurmCluster, tmp_path: Path) -> None:
    job = place.submit("stuck", "--set", "checkpoint.every_steps=1000")
    job.wait_for_step(10)
    os.kill(job.rank_pid(0), signal.SIGKILL)
    job.wait_until_over()
    assert job.events() == ["start", "end", "stop"], job.told()
    assert "without a new checkpoint since step 0" in job.last("stop")["why"]
