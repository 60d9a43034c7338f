"""What the processes of a run hold, written down again and again while it trains: memory, files, threads, mappings."""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

import psutil

from data_pipeline.durable import TEMPORARY_PATTERN

LAUNCHER = "launcher"  # the name of a process whose children are ranks


@dataclass(frozen=True)
class Held:
    """What one process holds at a moment.

    Attributes:
        name: the same for one process at all moments: its place among the processes of its attempt.
        pid: its number.
        pss: bytes of all resident memory; what n processes share counts as 1/n for each. So it rises and falls as
            others who have mapped the same libraries come and go, and as a forked process writes to what it shared.
        memory: bytes of the memory that belongs to no file, swapped out or not; what is shared counts in full. Neither
            of the two moves it.
        files: open file descriptors.
        threads: its threads.
        mappings: pieces of its address space: mapped files that stay show here.
        cpu: seconds of CPU time since it began.
    """

    name: str
    pid: int
    pss: int
    memory: int
    files: int
    threads: int
    mappings: int
    cpu: float


@dataclass(frozen=True)
class Sample:
    """A moment of a run.

    Attributes:
        seconds: since the sampler began.
        step: the newest that was logged; 0: none.
        tempfiles: files that are there under a temporary name or in the temporary folder.
        processes: all of the run's that could be read.
    """

    seconds: float
    step: int
    tempfiles: int
    processes: tuple[Held, ...]

    @classmethod
    def read(cls, path: Path) -> list[Sample]:
        """All samples of a file, in their order."""
        trees = (json.loads(line) for line in path.read_text().splitlines())
        return [cls(**{**tree, "processes": tuple(Held(**held) for held in tree["processes"])}) for tree in trees]


class Sampler:
    """Takes samples of a run beside the block, into a file of JSON lines.

    Args:
        roots: name -> number of the processes that the run has begun with, asked for anew for each sample; their
            descendants are found. Children of one called LAUNCHER are `rank N`; those of any other NAME are
            `NAME child N` in the order in which they began.
        run: the run's folder.
        path: the file.
        temporary: where files count as temporary, whatever their names.
        watched: where, and in whose subfolders, files count that have the names of unfinished ones.
        every_seconds: between the end of a sample and the next.
    """

    def __init__(
        self,
        roots: Callable[[], Mapping[str, int]],
        run: Path,
        path: Path,
        *,
        temporary: Path,
        watched: tuple[Path, ...] = (),
        every_seconds: float = 1.0,
    ) -> None:
        self._roots, self._run, self._path = roots, run, path
        self._temporary, self._watched, self._every = temporary, watched, every_seconds
        self._names: dict[tuple[int, float], str] = {}
        self._begun: Counter[int] = Counter()  # children seen so far, by the number of their parent
        self._ended, self._failed = threading.Event(), False
        self._thread = threading.Thread(target=self._work, name="sampler", daemon=True)

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()
        assert not self._failed or error is not None, "the sampler failed; its traceback stands above"

    def _work(self) -> None:
        self._failed = True
        began = time.monotonic()
        with self._path.open("a") as file:
            while not self._ended.wait(self._every):
                sample = self._take(time.monotonic() - began)
                file.write(json.dumps(asdict(sample)) + "\n")
                file.flush()
        self._failed = False

    def _take(self, seconds: float) -> Sample:
        step = newest_step(self._run)
        processes = tuple(held for name, process in self._found() if (held := _held(name, process)) is not None)
        return Sample(seconds, step, self._count_temporary([held.pid for held in processes]), processes)

    def _found(self) -> Iterator[tuple[str, psutil.Process]]:
        for name, pid in self._roots().items():
            with suppress(psutil.NoSuchProcess):
                yield from self._below(name, psutil.Process(pid))

    def _below(self, name: str, process: psutil.Process) -> Iterator[tuple[str, psutil.Process]]:
        yield name, process
        for child in sorted(process.children(), key=lambda child: (child.create_time(), child.pid)):
            with suppress(psutil.NoSuchProcess):
                key = (child.pid, child.create_time())
                if key not in self._names:
                    self._names[key] = self._name(name, process.pid, child)
                yield from self._below(self._names[key], child)

    def _name(self, parent: str, parent_pid: int, child: psutil.Process) -> str:
        number = self._begun[parent_pid]
        self._begun[parent_pid] += 1
        if parent != LAUNCHER:
            return f"{parent} child {number}"
        return f"rank {child.environ().get('RANK', number)}"  # a forked one has the environment of another process

    def _count_temporary(self, pids: list[int]) -> int:
        """Those of torch in shared memory bear the number of the process that made them."""
        count = sum(len(names) for _, _, names in os.walk(self._temporary))
        count += sum(1 for folder in self._watched for _ in folder.rglob(TEMPORARY_PATTERN))
        made_by = (re.match(r"torch_(\d+)_", name) for name in os.listdir("/dev/shm"))
        return count + sum(1 for made in made_by if made is not None and int(made[1]) in pids)


def newest_step(run: Path) -> int:
    """The newest step that a run has logged, also while it writes; 0: none."""
    with suppress(FileNotFoundError), (run / "metrics.jsonl").open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 2**14))
        lines = [line for line in file.read().split(b"\n") if line.startswith(b'{"step": ') and line.endswith(b"}")]
        return int(json.loads(lines[-1])["step"]) if lines else 0
    return 0


def _held(name: str, process: psutil.Process) -> Held | None:
    """None: it has ended, or begins or ends just now."""
    folder = Path(f"/proc/{process.pid}")
    try:
        with process.oneshot():
            pss = _kilobytes(folder / "smaps_rollup")["Pss"]
            status = _kilobytes(folder / "status")
            memory = status["RssAnon"] + status["RssShmem"] + status["VmSwap"]
            times = process.cpu_times()
            return Held(
                name, process.pid, 1024 * pss, 1024 * memory, process.num_fds(), process.num_threads(),
                (folder / "maps").read_text().count("\n"), times.user + times.system,
            )  # fmt: skip
    except (OSError, KeyError, psutil.Error):
        return None


def _kilobytes(path: Path) -> dict[str, int]:
    return {name: int(number) for name, number in re.findall(r"^(\w+):\s+(\d+) kB$", path.read_text(), re.MULTILINE)}
