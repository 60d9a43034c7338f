"""Worker processes: they outlive signals to the job, end with their iterator, and their errors arrive whole."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.datasets.read import ShardDataset
from data_pipeline.errors import RunError
from data_pipeline.workers import entries
from tests.data_pipeline.tiny import loader, write_shards


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> ShardDataset:
    return write_shards(tmp_path_factory.mktemp("shards"), [5, 0, 7, 1, 10])


def workers_of(pid: int) -> set[int]:
    """Running children of a process."""
    found = set()
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            state, parent = Path(f"/proc/{name}/stat").read_text().rsplit(")", 1)[1].split()[:2]
        except OSError:
            continue
        if int(parent) == pid and state != "Z":
            found.add(int(name))
    return found


def wait_until(condition: Any, seconds: float = 60) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return bool(condition())


class Faulty:
    """A table with a bug."""

    def __getitem__(self, index: int) -> int:
        return 1 // index


def test_a_bug_in_a_worker_is_shown_and_leaves_no_process() -> None:
    before = workers_of(os.getpid())
    with pytest.raises(ZeroDivisionError, match="in __getitem__") as caught:
        list(entries(Faulty(), [1, 0, 1], num_workers=2))
    assert workers_of(os.getpid()) == before
    del caught  # it held the traceback, and so all that was alive then, until here


@pytest.mark.parametrize("how", ["closed", "dropped"])
def test_workers_end_with_their_iterator(dataset: ShardDataset, how: str) -> None:
    before = workers_of(os.getpid())
    stream: Any = loader(dataset, num_workers=2).steps(0)
    next(stream)
    assert len(workers_of(os.getpid()) - before) == 2
    if how == "closed":
        stream.close()
    del stream
    assert workers_of(os.getpid()) == before


def test_workers_outlive_a_signal_to_the_whole_job(dataset: ShardDataset) -> None:
    before = workers_of(os.getpid())
    with closing(loader(dataset, num_workers=1).steps(0)) as stream:  # type: ignore[type-var]
        next(stream)
        (worker,) = workers_of(os.getpid()) - before
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.kill(worker, number)
        assert len(list(islice(stream, 10))) == 10
    assert workers_of(os.getpid()) == before


def test_a_killed_worker_is_an_error_of_ours(dataset: ShardDataset) -> None:
    before = workers_of(os.getpid())
    with closing(loader(dataset, num_workers=1).steps(0)) as stream:  # type: ignore[type-var]
        next(stream)
        (worker,) = workers_of(os.getpid()) - before
        time.sleep(0.5)  # until it waits for work: torch's workers share a semaphore that dies with who holds it
        os.kill(worker, signal.SIGBUS)  # as the kernel does where a mapped file got smaller
        # torch's own handler raises wherever the training happens to be
        assert signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL
        with pytest.raises(
            RunError, match=r"loader worker: .* was killed by SIGBUS \(a file .* got smaller.* runtime.num_workers"
        ):
            list(islice(stream, 10))


SCRIPT = """
import os, signal, sys, time
from data_pipeline.batch import BatchSpec
from data_pipeline.loader import TrainLoader
from data_pipeline.datasets.read import open_dataset
from data_pipeline.samples.config import Views
stream = TrainLoader(
    open_dataset(sys.argv[1]), BatchSpec(8), Views(), seed=0, read_streams=1, shuffle_window=1,
    global_size=2, micro_size=2, num_workers=2, max_pixels=10**6,
).steps(0)
next(stream)
print("ready", flush=True)
if sys.argv[2] == "killed":
    time.sleep(60)
"""


def test_workers_end_with_their_process(dataset: ShardDataset) -> None:
    """Of two processes that never close their iterators, one comes to its end, and the other is killed."""
    command = [sys.executable, "-c", SCRIPT, str(dataset.manifest.root)]
    options: dict[str, Any] = {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
        "text": True,
        "env": {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
    }
    ends, killed = (subprocess.Popen([*command, how], **options) for how in ("ends", "killed"))
    try:
        assert ends.communicate(timeout=100)[0] == "ready\n"
        assert ends.returncode == 0
        assert killed.stdout is not None
        assert killed.stdout.readline() == "ready\n"
        workers = workers_of(killed.pid)
        assert len(workers) == 2
    finally:
        for process in (ends, killed):
            process.kill()
            process.wait()
    assert wait_until(lambda: not any(os.path.exists(f"/proc/{worker}") for worker in workers))
    killed.stdout.close()


class Unsendable:
    """As a tensor for which there is no room in /dev/shm."""

    def __reduce__(self) -> Any:
        raise OSError(28, "No space left on device", "/torch_1_2")


class Table:
    """Entries that cannot be sent."""

    def __getitem__(self, index: int) -> object:
        return Unsendable()


def test_a_worker_that_cannot_hand_over_ends_the_wait_with_its_words() -> None:
    """Python's queue drops such an entry, and the other side would wait for it for ever, here for the first one."""
    before = workers_of(os.getpid())
    with pytest.raises(RunError, match=r"loader worker: .*could not hand a batch over .*No space left.*/dev/shm"):
        next(entries(Table(), [0], num_workers=1))
    assert workers_of(os.getpid()) == before


class Stuck:
    def __getitem__(self, index: int) -> int:
        time.sleep(3600 * index)
        return index


def test_workers_that_make_nothing_end_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipeline.workers.STALLED_SECONDS", 0.0)
    before = workers_of(os.getpid())
    with pytest.raises(RunError, match="loader workers: expected a batch, found none for"):
        list(entries(Stuck(), [1], num_workers=1))
    assert wait_until(lambda: workers_of(os.getpid()) == before)


class Usage:
    def __init__(self, free: int) -> None:
        self.free = free


def test_a_small_shared_memory_is_told_before_any_process_starts(
    dataset: ShardDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_step = 4 * 2 * 3 * 8 * 8  # samples, views, channels, pixels
    before = workers_of(os.getpid())
    for free, enough in ((8 * of_step, True), (8 * of_step - 1, False)):
        monkeypatch.setattr("shutil.disk_usage", lambda _, free=free: Usage(free))
        stream = loader(dataset, num_workers=3)
        if enough:
            stream.steps(0)
        else:
            with pytest.raises(RunError, match=r"/dev/shm: expected .* for 8 batches of 3 loader workers"):
                stream.steps(0)
    assert workers_of(os.getpid()) == before
