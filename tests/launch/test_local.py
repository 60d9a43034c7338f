"""Ranks as real processes: what they are told, how they are heard, and that none outlives the others."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from pretrain.runtime.signals import STOPPED
from tests.gate import until

ROOT = Path(__file__).resolve().parents[2]

LAUNCH = (
    "import sys; from launch.ranks.launcher import launch; "
    "sys.exit(launch(sys.argv[2:], int(sys.argv[1]), module='part', grace_seconds=1.0))"
)

SAVES = LAUNCH.replace("import launch;", "import SAVING, launch;").replace("grace", "passed_on=SAVING, grace")
PATIENT = LAUNCH.replace("grace_seconds=1.0", "grace_seconds=30.0")

# Python's handlers run in the main thread, which a signal to another one does not wake; one that comes in the moment
# before it begins to wait is the same, and cannot be timed.
GIVEN_TO_ANOTHER_THREAD = """
import pathlib, signal, sys, threading, time

def given():
    while not all(pathlib.Path(sys.argv[-1], name).exists() for name in ("0.json", "1.json")):
        time.sleep(0.01)
    time.sleep(0.5)  # until the main thread waits
    signal.pthread_kill(threading.get_ident(), signal.SIGTERM)

threading.Thread(target=given, daemon=True).start()
"""

PART = """
import json, os, pathlib, signal, subprocess, sys, time

what, folder = sys.argv[1], pathlib.Path(sys.argv[2])
rank = int(os.environ["RANK"])

def started(*others):
    (folder / f"{rank}.tmp").write_text(json.dumps([os.getpid(), *others]))
    (folder / f"{rank}.tmp").rename(folder / f"{rank}.json")

if what == "environment":
    names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT OMP_NUM_THREADS".split()
    (folder / f"{rank}.json").write_text(json.dumps([{n: os.environ[n] for n in names}, sys.argv, __name__]))
elif what == "words":
    print("out", rank)
    print(f"err {rank}\\n", end="", file=sys.stderr)  # in one write, as the launcher writes between
    print(f"[rank {rank}] already numbered\\n", end="", file=sys.stderr)
elif what == "fail" and rank == 1:
    print("the reason")
    sys.exit(7)
elif what == "killed" and rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
elif what == "place":
    names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT OWN".split()
    (folder / f"{rank}.json").write_text(json.dumps({n: os.environ[n] for n in names}))
elif what == "nested":
    from launch.ranks.launcher import launch

    sys.exit(launch(["asked", str(folder)], 2, module="part", grace_seconds=1.0))
elif what == "asked":
    slow = 2 * (rank % 2)
    signal.signal(signal.SIGUSR2, lambda *_: (time.sleep(slow), (folder / f"saved{rank}").touch(), os._exit(75)))
    started()
    time.sleep(100)
elif what in ("late", "late-polite") and rank == 1:
    while not (folder / "0.json").exists():
        time.sleep(0.01)
    sys.exit(3)
else:
    if what in ("deaf", "late"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGUSR2, lambda *_: (folder / f"heard{rank}").touch())
    if what.endswith("polite"):
        signal.signal(signal.SIGTERM, lambda *_: ((folder / f"saved{rank}").touch(), sys.exit(0)))
    worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    started(worker.pid)
    time.sleep(100)
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "part.py").write_text(PART)
    return {
        **{name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"},
        "PYTHONPATH": f"{ROOT}:{tmp_path}",
    }


def start(
    what: str, folder: Path, environment: dict[str, str], num_ranks: int = 2, program: str = LAUNCH
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", program, str(num_ranks), what, str(folder)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that starts the tests in the background has its children ignore SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def family(folder: Path, ranks: tuple[int, ...]) -> list[psutil.Process]:
    """The ranks and what they started, once all are up."""
    until(lambda: all((folder / f"{rank}.json").exists() for rank in ranks), seconds=60)
    return [psutil.Process(pid) for rank in ranks for pid in json.loads((folder / f"{rank}.json").read_text())]


def all_gone(processes: list[psutil.Process], seconds: float = 5) -> bool:
    psutil.wait_procs(processes, timeout=seconds)
    return not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes)


def test_ranks_are_told_what_torchrun_tells(tmp_path: Path, environment: dict[str, str]) -> None:
    launcher = start("environment", tmp_path, environment, num_ranks=3)
    assert launcher.wait(timeout=60) == 0
    told = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    cores = len(os.sched_getaffinity(0))
    ports = set()
    for rank, (variables, argv, name) in enumerate(told):
        ports.add(variables.pop("MASTER_PORT"))
        assert variables == {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "3",
            "LOCAL_WORLD_SIZE": "3",
            "MASTER_ADDR": "127.0.0.1",
            "OMP_NUM_THREADS": str(max(1, cores // 3)),
        }
        assert argv[1:] == ["environment", str(tmp_path)]
        assert name == "__main__"
    assert len(ports) == 1


PLACED = (
    "import sys; from launch.ranks.launcher import Place, launch; "
    "place = Place(first_rank=4, world_size=6, master=('far', 77), environment={'OWN': 'x'}); "
    "sys.exit(launch(sys.argv[2:], int(sys.argv[1]), module='part', place=place, passed_on={15: 12}))"
)


def test_ranks_of_one_node_of_many(tmp_path: Path, environment: dict[str, str]) -> None:
    assert start("place", tmp_path, environment, program=PLACED).wait(timeout=60) == 0
    for local_rank in range(2):
        assert json.loads((tmp_path / f"{4 + local_rank}.json").read_text()) == {
            "RANK": str(4 + local_rank), "LOCAL_RANK": str(local_rank), "WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "far", "MASTER_PORT": "77", "OWN": "x",
        }  # fmt: skip


@pytest.mark.parametrize(
    ("program", "signum"),
    [(LAUNCH, signal.SIGUSR2), (PLACED, signal.SIGTERM), (SAVES, signal.SIGINT), (SAVES, signal.SIGTERM)],
)
def test_ranks_that_are_asked_to_stop_are_waited_for(
    tmp_path: Path, environment: dict[str, str], program: str, signum: int
) -> None:
    """The second takes longer over its last save than the grace for ranks that failed."""
    launcher = start("asked", tmp_path, environment, program=program)
    first = 4 if program == PLACED else 0
    ranks = family(tmp_path, (first, first + 1))
    launcher.send_signal(signum)
    assert launcher.wait(timeout=60) == 75
    assert all((tmp_path / f"saved{rank}").exists() for rank in (first, first + 1))
    assert all_gone(ranks)


def test_a_signal_that_does_not_wake_the_main_thread_is_heard(tmp_path: Path, environment: dict[str, str]) -> None:
    assert start("asked", tmp_path, environment, program=GIVEN_TO_ANOTHER_THREAD + SAVES).wait(timeout=60) == 75
    assert all((tmp_path / f"saved{rank}").exists() for rank in (0, 1))


def test_ranks_of_a_command_in_a_job_save_too(tmp_path: Path, environment: dict[str, str]) -> None:
    (tmp_path / "job.py").write_text(
        "import sys, launch.jobs.job as job\n"
        "from launch.slurm.cluster import Cluster; from launch.ranks.launcher import launch\n"
        "job.launch = lambda words, n, **more: launch(words, n, **{**more, 'module': 'part', 'grace_seconds': 1.0})\n"
        "rendezvous = job.Rendezvous('127.0.0.1', 1, 0)\n"
        "sys.exit(job._run_command(sys.argv[2:], Cluster(time_minutes=20), rendezvous))\n"
    )
    launcher = start("nested", tmp_path, environment, program="import job")
    ranks = family(tmp_path, (0, 1))
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(timeout=30) == STOPPED
    assert all((tmp_path / f"saved{rank}").exists() for rank in (0, 1))
    assert all_gone(ranks)


def test_a_number_of_threads_that_is_set_is_kept(tmp_path: Path, environment: dict[str, str]) -> None:
    assert start("environment", tmp_path, {**environment, "OMP_NUM_THREADS": "5"}).wait(timeout=60) == 0
    assert json.loads((tmp_path / "0.json").read_text())[0]["OMP_NUM_THREADS"] == "5"


def test_rank_0_speaks_for_itself_and_the_others_with_their_number(tmp_path: Path, environment: dict[str, str]) -> None:
    out, err = start("words", tmp_path, environment).communicate(timeout=60)
    assert out == "out 0\n"
    assert sorted(err.splitlines()) == [
        "[rank 0] already numbered",
        "[rank 1] already numbered",
        "[rank 1] err 1",
        "[rank 1] out 1",
        "err 0",
    ]


def test_the_status_of_the_rank_that_failed_is_passed_on_and_the_others_are_stopped(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    program = LAUNCH.replace("grace_seconds=1.0", "grace_seconds=5.0")
    launcher = start("late", tmp_path, environment, program=program)
    left = family(tmp_path, (0,))
    assert launcher.wait(timeout=60) == 3, "and not of the one that was killed for it"
    assert all_gone(left), "a rank that ignores SIGTERM is killed, with what it started"


def test_the_others_are_asked_to_stop_before_they_are_killed(tmp_path: Path, environment: dict[str, str]) -> None:
    assert start("late-polite", tmp_path, environment, program=PATIENT).wait(timeout=60) == 3
    assert (tmp_path / "saved0").exists()


def test_a_failing_rank_is_heard(tmp_path: Path, environment: dict[str, str]) -> None:
    launcher = start("fail", tmp_path, environment)
    _, err = launcher.communicate(timeout=60)
    assert launcher.returncode == 7
    assert err == "[rank 1] the reason\n"


def test_a_rank_that_a_signal_killed_is_named(tmp_path: Path, environment: dict[str, str]) -> None:
    launcher = start("killed", tmp_path, environment)
    _, err = launcher.communicate(timeout=60)
    assert launcher.returncode == 128 + signal.SIGKILL
    assert err == "error: rank 1 was killed by SIGKILL (perhaps for want of memory); the others were stopped\n"


def test_a_signal_is_passed_on_so_that_ranks_can_save(tmp_path: Path, environment: dict[str, str]) -> None:
    launcher = start("polite", tmp_path, environment, program=PATIENT)
    processes = family(tmp_path, (0, 1))
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(timeout=60) == 128 + signal.SIGTERM
    assert all((tmp_path / f"saved{rank}").exists() for rank in (0, 1))
    assert all_gone(processes)


def test_ctrl_c_stops_all_and_a_second_one_does_not_wait(tmp_path: Path, environment: dict[str, str]) -> None:
    launcher = start("wait", tmp_path, environment)
    processes = family(tmp_path, (0, 1))
    launcher.send_signal(signal.SIGINT)
    assert launcher.wait(timeout=60) == 130
    assert all_gone(processes)

    for rank in (0, 1):
        (tmp_path / f"{rank}.json").unlink()
    launcher = start("deaf", tmp_path, environment, program=PATIENT)
    processes = family(tmp_path, (0, 1))
    launcher.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):  # ranks that save may take their time
        launcher.wait(timeout=0.3)
    launcher.send_signal(signal.SIGINT)
    assert launcher.wait(timeout=60) == 130
    assert all_gone(processes)


def test_a_second_signal_kills_ranks_that_save(tmp_path: Path, environment: dict[str, str]) -> None:
    launcher = start("deaf", tmp_path, environment, program=SAVES)
    processes = family(tmp_path, (0, 1))
    launcher.send_signal(signal.SIGINT)
    until(lambda: all((tmp_path / f"heard{rank}").exists() for rank in (0, 1)), seconds=60)
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(timeout=60) == 128 + signal.SIGTERM
    assert all_gone(processes)


def test_ranks_that_do_not_stop_are_killed_while_there_is_time(tmp_path: Path, environment: dict[str, str]) -> None:
    """A scheduler that will kill everything soon asks by SIGTERM; they were to stop, so that is what they did."""
    script = LAUNCH.replace(
        "grace_seconds=1.0", "passed_on={15: 12}, seconds_left=lambda signum: 1.0 if signum == 15 else None"
    )
    for signum in (signal.SIGTERM, signal.SIGUSR2):
        launcher = start("asked", tmp_path, environment, program=script)
        processes = family(tmp_path, (0, 1))
        for process in processes:
            process.suspend()
        launcher.send_signal(signum)
        if signum == signal.SIGUSR2:
            with pytest.raises(subprocess.TimeoutExpired):  # a warning leaves as much time as it takes
                launcher.wait(timeout=2)
            launcher.send_signal(signal.SIGTERM)
        assert launcher.wait(timeout=60) == STOPPED
        assert all_gone(processes)
        for rank in (0, 1):
            (tmp_path / f"{rank}.json").unlink()


def test_no_rank_outlives_a_launcher_that_was_killed(tmp_path: Path, environment: dict[str, str]) -> None:
    launcher = start("deaf", tmp_path, environment)
    processes = family(tmp_path, (0, 1))
    ranks, workers = processes[::2], processes[1::2]
    try:
        launcher.kill()
        launcher.wait()
        assert all_gone(ranks)
    finally:
        for worker in workers:
            worker.kill()
