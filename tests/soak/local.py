"""The soak on this machine: two ranks with loader workers, which read from a server in bad health, save and evaluate.

The same recipe is trained twice: once without a disturbance, by which growth is judged, and once killed again and
again.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import psutil

from pretrain.runtime.run_folder import complete_checkpoints
from tests.data_pipeline.servers import Fault, served
from tests.runs import write_recipe
from tests.shards import write_shards
from tests.soak.sampler import LAUNCHER, Sample, Sampler, newest_step

NUM_RANKS, GLOBAL_SIZE = 2, 8
NUM_SAMPLES, PER_SHARD = 240, 20
ROOM = 9  # shards that the cache holds, of the 12 of the training set and those of the evaluations
FAULTS = ("500", "truncate", "page", "stall", "short", "flip")
FAULT_EVERY = 20  # requests
LOOK_SECONDS = 0.02  # between looks at a run that is to be killed


class Attempt(Protocol):
    """A `pretrain` command at work; its output goes to a file."""

    @property
    def pid(self) -> int: ...

    def poll(self) -> int | None:
        """Returns its exit status once it has ended."""

    def kill(self) -> None: ...


Start = Callable[[Sequence[str], Mapping[str, str], Path], Attempt]  # words, environment, file of its output


def start_process(words: Sequence[str], environment: Mapping[str, str], log: Path) -> Attempt:
    """`pretrain WORDS` as users have it."""
    with log.open("a") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "launch.cli", *words], env=dict(environment), stdout=file, stderr=file
        )


@dataclass(frozen=True)
class Settings:
    """How much is done.

    Attributes:
        steps: of the recipe.
        every: steps from one evaluation and save to the next.
        kill_seconds: of training between kills.
        max_kills: None: as many as there is time for.
        sample_seconds: between samples.
        log_every: steps.
        seed: of the kills.
    """

    steps: int = 20_000
    every: int = 200
    kill_seconds: float = 180.0
    max_kills: int | None = None
    sample_seconds: float = 1.0
    log_every: int = 10
    seed: int = 0


@dataclass(frozen=True)
class Phase:
    """What a phase has left: the run's folder, and beside it its samples and output."""

    run: Path

    @property
    def samples(self) -> Path:
        return self.run.with_suffix(".samples.jsonl")

    @property
    def log(self) -> Path:
        return self.run.with_suffix(".log")


@dataclass(frozen=True)
class Bench:
    """A recipe, the server that it reads from, and how its runs are started.

    Attributes:
        folder: holds the recipe, and the runs with what is left of them.
        temporary: what processes make under TMPDIR.
        requests: names that the server was asked for so far.
        faults: what was wrong with each answer; None: nothing.
    """

    folder: Path
    settings: Settings
    start: Start
    temporary: Path
    requests: Sequence[str]
    faults: Sequence[Fault]

    def train(self, name: str, killer: Killer | None = None) -> Phase:
        """A run of the recipe to its end: whenever it was killed, it is started again with the same words.

        Raises:
            AssertionError: it ended although nobody had killed it; with the end of its output.
        """
        phase = Phase(self.folder / name)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TMPDIR": str(self.temporary)}
        words = ("train", str(self.folder / "recipe.yaml"), "--nproc", str(NUM_RANKS), "--out", str(phase.run))
        roots: dict[str, int] = {}
        with Sampler(
            lambda: dict(roots), phase.run, phase.samples, temporary=self.temporary,
            watched=(phase.run, self.folder / "cache"), every_seconds=self.settings.sample_seconds,
        ):  # fmt: skip
            while True:
                attempt = self.start(words, environment, phase.log)
                roots[LAUNCHER] = attempt.pid
                try:
                    killed = killer is not None and killer.kill_once(attempt, phase.run)
                    while (status := attempt.poll()) is None:
                        time.sleep(LOOK_SECONDS)
                finally:
                    _kill_all(attempt)
                if status == 0:
                    return phase
                tail = phase.log.read_text()[-4000:]
                assert killed, f"the run ended with status {status}, and nobody had killed it:\n{tail}"


@contextmanager
def prepared(folder: Path, settings: Settings, start: Start = start_process) -> Iterator[Bench]:
    """Makes data and recipe in a folder that is new, and serves the data beside the block."""
    folder.mkdir(parents=True)
    shards = write_shards(folder / "shards" / "train", NUM_SAMPLES, per_shard=PER_SHARD).parent
    write_shards(shards / "val", 2 * PER_SHARD + 1, per_shard=PER_SHARD)
    rng = random.Random(settings.seed)

    def choose(number: int, name: str) -> Fault:
        return rng.choice(FAULTS) if number % FAULT_EVERY == 7 else None

    # Not below the folder, whose path may be too long for the sockets that are made there.
    with served(shards, choose) as server, tempfile.TemporaryDirectory(prefix="soak-") as temporary:
        _write(folder, server.url, settings)
        yield Bench(folder, settings, start, Path(temporary), server.requests, server.faults)


def seconds_per_step(settings: Settings, steps: int = 600) -> float:
    """Of a short run like the soak's, its evaluations and saves included and its start left out."""
    pilot = replace(settings, steps=steps, sample_seconds=0.2)
    with tempfile.TemporaryDirectory(prefix="soak-") as name, prepared(Path(name) / "soak", pilot) as bench:
        moments = [sample for sample in Sample.read(bench.train("pilot").samples) if sample.step]
        return (moments[-1].seconds - moments[0].seconds) / max(1, moments[-1].step - moments[0].step)


def _write(folder: Path, url: str, settings: Settings) -> None:
    largest = max(path.stat().st_size for path in (folder / "shards").rglob("*.tar"))
    every_epochs = settings.every * GLOBAL_SIZE / NUM_SAMPLES
    cache = {"folder": str(folder / "cache"), "max_gb": (ROOM + 0.5) * largest / 1e9, "timeout_seconds": 3}
    knn = {"kind": "knn", "train": f"{url}/train", "test": f"{url}/val", "k": 5, "every_epochs": every_epochs}
    write_recipe(
        folder / "recipe.yaml",
        "",
        data={
            "train": f"{url}/train", "val": f"{url}/val", "read_streams": 2, "shuffle_window": 16, "cache": cache,
            "max_bad_samples": 0,
        },
        schedule={"steps": settings.steps, "warmup": 0.1},
        batch={"global_size": GLOBAL_SIZE},
        runtime={"peak_tflops": 0.1, "threads": 1, "num_workers": 1},
        logging={"every_steps": settings.log_every, "tensorboard": True},
        checkpoint={"every_steps": settings.every, "every_minutes": None, "keep_last": 2},
        validation={"every_epochs": every_epochs},
        evals=[knn],
    )  # fmt: skip


class Killer:
    """Kills, in turn, a rank or all processes of a run, once it has trained long enough and has saved.

    Attributes:
        kills: the newest logged step and what was killed there, one after the other.
    """

    def __init__(self, settings: Settings) -> None:
        """The settings say how long, how often, and by which seed."""
        self._settings, self._rng = settings, random.Random(settings.seed)
        self.kills: list[tuple[int, str]] = []

    def kill_once(self, attempt: Attempt, run: Path) -> bool:
        """Returns once it has killed, or once the attempt has ended before."""
        if self._settings.max_kills is not None and len(self.kills) >= self._settings.max_kills:
            return False
        began_at, saved = newest_step(run), _saved(run)
        while newest_step(run) == began_at and attempt.poll() is None:
            time.sleep(LOOK_SECONDS)
        moment = time.monotonic() + self._rng.uniform(0.5, 1.5) * self._settings.kill_seconds
        while time.monotonic() < moment or _saved(run) == saved:  # or a run might stay where it is for ever
            if attempt.poll() is not None:
                return False
            time.sleep(LOOK_SECONDS)
        what = ("one rank", "all")[len(self.kills) % 2]
        self.kills.append((newest_step(run), what))
        if what == "all":
            _kill_all(attempt)
        else:
            with suppress(psutil.NoSuchProcess, IndexError):
                self._rng.choice(_ranks(attempt)).kill()
        print(f"step {self.kills[-1][0]}: killed {what}", flush=True)
        return True


def _ranks(attempt: Attempt) -> list[psutil.Process]:
    """In the order in which they began: the launcher's children with an address space of their own."""
    return sorted(psutil.Process(attempt.pid).children(), key=lambda child: (child.create_time(), child.pid))


def _saved(run: Path) -> str:
    return max((path.name for path in complete_checkpoints(run / "checkpoints")), default="")


def _kill_all(attempt: Attempt) -> None:
    """Ends what is left of an attempt: the launcher and all its descendants, at once."""
    processes: list[psutil.Process] = []
    with suppress(psutil.NoSuchProcess):
        processes = psutil.Process(attempt.pid).children(recursive=True)
    attempt.kill()
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGKILL)
    psutil.wait_procs(processes, timeout=60)
