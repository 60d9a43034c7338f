"""What a signal requests, what is said at once, and that a second one ends the process."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pretrain.checkpoints.schedule import CheckpointSchedule
from pretrain.runtime.collectives import World
from pretrain.runtime.signals import SignalRequests, stop_while_starting
from pretrain.runtime.state import Progress, RunState
from tests.commands import Command, begun
from tests.gate import until
from tests.ranks import run_ranks

STOPPERS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


def at_work() -> None:
    """Steps without an end; each request that one of them takes is counted in `taken`."""
    requests = SignalRequests()
    with requests.listening():
        ready(requests.take)


def starting() -> None:
    stop_while_starting()
    ready()


def ignoring() -> None:
    """As under nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with SignalRequests().listening():
        os.kill(os.getpid(), signal.SIGHUP)
        ready()


def ready(take: Callable[[], object] = lambda: None) -> None:
    taken = 0
    Path("ready").touch()
    while True:
        if take():
            taken += 1
            Path("taken").write_text(str(taken))
        time.sleep(0.01)


def send(process: Command, folder: Path, signum: int, nth: int) -> None:
    """Sends a signal, which is the nth, and waits until it is taken: of those that wait the kernel makes one."""
    os.kill(process.pid, signum)
    path = folder / "taken"
    until(lambda: path.exists() and path.read_text() == str(nth), meanwhile=process.running, said=process.said)


@pytest.mark.parametrize("signum", STOPPERS)
def test_the_first_is_answered_at_once_and_the_second_ends_at_once(tmp_path: Path, signum: int) -> None:
    with begun(at_work, tmp_path) as process:
        until((tmp_path / "ready").exists, meanwhile=process.running, seconds=60)
        send(process, tmp_path, signal.SIGUSR2, 1)  # as a launcher passes on what was sent to the rank as well
        assert "a second Ctrl-C or SIGTERM ends it at once" in process.said()
        send(process, tmp_path, signum, 2)
        os.kill(process.pid, signum)
        assert process.wait().status == 128 + signum
        assert process.said().count("asked to stop") == 1


def test_in_a_job_the_scheduler_may_send_as_many_as_it_likes(tmp_path: Path) -> None:
    with begun(at_work, tmp_path, {**os.environ, "PRETRAIN_ATTEMPT": "0"}) as process:
        until((tmp_path / "ready").exists, meanwhile=process.running, seconds=60)
        for nth in (1, 2, 3):
            send(process, tmp_path, signal.SIGTERM, nth)
        assert "asked to stop" in process.said()
        assert "a second" not in process.said()


@pytest.mark.parametrize("signum", STOPPERS)
def test_before_the_first_step_it_stops_at_once(tmp_path: Path, signum: int) -> None:
    with begun(starting, tmp_path) as process:
        until((tmp_path / "ready").exists, meanwhile=process.running, seconds=60)
        os.kill(process.pid, signum)
        done = process.wait()
    assert done.status == 75
    assert done.stderr == "asked to stop before the first step; the same command goes on\n"


def test_what_a_process_was_told_to_ignore_it_ignores(tmp_path: Path) -> None:
    with begun(ignoring, tmp_path) as process:
        until((tmp_path / "ready").exists, meanwhile=process.running, seconds=60)
        assert process.said() == ""


def stops_of_one_that_is_asked(world: World) -> list[bool]:
    """Before the first step; in the evaluation of step 1, before its save."""
    found = []
    for moment in ("start", "evaluation"):
        requests = SignalRequests()
        with requests.listening():
            if moment == "start":
                os.kill(os.getpid(), signal.SIGINT)
            schedule = CheckpointSchedule(None, world=world, requests=requests, every_steps=1, every_minutes=None)
            found.append(schedule.stopping)
            if moment == "evaluation":
                assert schedule.due(1)
                os.kill(os.getpid(), signal.SIGINT)
                schedule.save(RunState(Progress(1, 2, 8)))
                schedule.due(2)
                found.append(schedule.stopping)
    return found


def test_a_request_is_kept_until_it_is_answered() -> None:
    assert run_ranks(stops_of_one_that_is_asked, 1) == [[True, False, True]]
