"""Runs that are submitted, watched, and disturbed."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from launch.jobs.folder import JobFolder
from launch.slurm.commands import shorten_requeue_delay
from pretrain.runtime.signals import STOPPED
from tests.job_gate import JobGate
from tests.runs import losses, write_recipe
from tests.shards import write_shards
from tests.slurm.cluster import SlurmCluster

CHECKOUT = Path(__file__).resolve().parents[2]
STEPS, SAVED_EVERY = 144, 10
SECRETS = ("WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "MY_TOKEN")  # what users have in their environment
CANARY = "canary-3f1b9c2e7a5d"
ASK_SECONDS = 1.0  # between questions to SLURM
STILL_THERE = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED")


def write_slurm_recipe(folder: Path) -> Path:
    """A MAE of twelve epochs of twelve steps, a few seconds on two ranks, which saves every ten steps."""
    shards, val = write_shards(folder / "train", 96), write_shards(folder / "val", 17)
    return write_recipe(
        folder / "recipe.yaml", shards,
        data={"train": str(shards), "val": str(val), "read_streams": 3, "shuffle_window": 16},
        schedule={"steps": STEPS, "warmup": 0.1},
        batch={"global_size": 8},
        checkpoint={"every_steps": SAVED_EVERY, "every_minutes": None, "keep_last": 2},
        validation={"every_epochs": 5},
    )  # fmt: skip


@dataclass(frozen=True)
class Place:
    """A cluster, and a folder from which runs are submitted to it."""

    cluster: SlurmCluster
    folder: Path

    def pretrain(self, *words: str, check: bool = True, seconds: float = 300) -> subprocess.CompletedProcess[str]:
        with self.begun(*words, stderr=subprocess.PIPE) as command:
            out, err = command.communicate(timeout=seconds)
        assert not check or command.returncode == 0, out + err
        return subprocess.CompletedProcess(words, command.returncode, out, err)

    @contextmanager
    def begun(self, *words: str, stderr: int = subprocess.STDOUT) -> Iterator[subprocess.Popen[str]]:
        """`pretrain WORDS` at work, in an environment with secrets; killed at the end if it then still is."""
        command = [sys.executable, "-m", "launch.cli", *words]
        environment = {**self.cluster.environment, "PYTHONPATH": str(CHECKOUT), **dict.fromkeys(SECRETS, CANARY)}
        given: dict[str, Any] = {"env": environment, "cwd": self.folder, "stdout": subprocess.PIPE, "stderr": stderr}
        with subprocess.Popen(command, text=True, **given) as process:
            try:
                yield process
                process.wait(60)
            finally:
                process.kill()

    def cluster_file(self, **keys: Any) -> Path:
        tree = {
            "partition": "main",
            "nodes": 2,
            "time_minutes": 10,
            "signal_lead_seconds": 30,
            "max_requeues": 5,
            **keys,
        }
        path = self.folder / f"cluster-{time.monotonic_ns()}.yaml"
        path.write_text(yaml.safe_dump(tree))
        return path

    def submit(self, name: str, *words: str, gates: Sequence[int] = (), **keys: Any) -> Submitted:
        """`pretrain submit` of the folder's recipe as the run `name`.

        Args:
            gates: steps at whose checkpoint the run waits until `JobGate.release`.
        """
        gate = self.gate(name, *gates) if gates else None
        file = self.cluster_file(**keys, **({"setup": gate.setup()} if gate else {}))
        self.pretrain("submit", "recipe.yaml", "--cluster", str(file), "--out", name, *words)
        run = self.folder / name
        return Submitted(self.cluster, run, str(JobFolder(run).submitted()["job_id"]), gate)

    def gate(self, name: str, *steps: int) -> JobGate:
        """Closed at these steps."""
        gate = JobGate(self.folder / f"{name}.gate")
        gate.close(*steps)
        return gate

    def wait_for_all(self, out: Path, seconds: float = 300) -> None:
        """Until no job is left in the queue; fails with the logs below `out` where the time is over."""
        deadline = time.monotonic() + seconds
        while jobs := self.cluster.run("squeue", "--noheader", "--format=%A %r").splitlines():
            for job_id in [line.split()[0] for line in jobs if line.endswith("BeginTime")]:
                with self.cluster.spoken_to():
                    shorten_requeue_delay(self.cluster.job(job_id))
            if time.monotonic() > deadline:
                logs = [path.read_text()[-3000:] for path in out.rglob("*_log.out")]
                raise AssertionError("\n".join([self.cluster.run("squeue"), *logs]))
            time.sleep(ASK_SECONDS)


@dataclass(frozen=True)
class Submitted:
    """A run whose job is in the queue, or was."""

    cluster: SlurmCluster
    run: Path
    job_id: str
    gate: JobGate | None = None

    def events(self) -> list[str]:
        return [event["event"] for event in JobFolder(self.run).events()]

    def last(self, event: str) -> dict[str, Any]:
        return next(e for e in reversed(JobFolder(self.run).events()) if e["event"] == event)

    def held(self, step: int, ranks: int = 2) -> None:
        """Waits until all ranks of the run stand at its gate at that step."""
        gate = self.gate
        assert gate is not None
        self.wait(lambda: gate.waiting(step) == ranks, what=f"the gate at step {step}")

    def release(self, step: int) -> None:
        assert self.gate is not None
        self.gate.release(step)

    def step(self) -> int:
        """The newest that was logged."""
        path = self.run / "metrics.jsonl"
        lines = path.read_bytes().split(b"\n") if path.is_file() else []
        return max((json.loads(line)["step"] for line in lines if line.endswith(b"}")), default=0)

    def wait(
        self,
        condition: Callable[[], bool] = lambda: True,
        seconds: float = 240,
        what: str = "condition",
        state: Callable[[str], bool] | None = None,
    ) -> None:
        """Waits; lets a requeued job start at once. Fails with the job's log where the time is over.

        Args:
            condition: of the run's folder.
            seconds: at most.
            what: is waited for.
            state: of the job, by SLURM's word, which is asked for once a second.
        """
        deadline, asked = time.monotonic() + seconds, -math.inf
        while not (met := condition()) or state is not None:
            if time.monotonic() > deadline:
                raise AssertionError(f"{what} not reached in {seconds} s\n{self.told()}")
            if time.monotonic() - asked >= ASK_SECONDS:
                asked, fields = time.monotonic(), self.cluster.job(self.job_id)
                if met and state is not None and state(fields["JobState"]):
                    return
                with self.cluster.spoken_to():
                    shorten_requeue_delay(fields)
            time.sleep(0.02)

    def wait_for_step(self, step: int) -> None:
        self.wait(lambda: self.step() >= step, what=f"step {step}")

    def said_its_end(self) -> bool:
        return self.events()[-1:] in (["done"], ["stop"], ["cancel"])

    def wait_until_over(self, seconds: float = 300) -> None:
        """By its own word, and SLURM's: SLURM calls a job that it queues again by other names for a moment."""
        self.wait(self.said_its_end, seconds, "the end of the job", state=lambda state: state not in STILL_THERE)

    def log(self) -> str:
        return "".join(path.read_text() for path in sorted(JobFolder(self.run).logs.glob("*_log.out")))

    def told(self) -> str:
        events = "\n".join(json.dumps(event) for event in JobFolder(self.run).events())
        return f"{dict(self.cluster.job(self.job_id))}\n{events}\n{self.log()[-6000:]}"

    def rank_pids(self) -> list[int]:
        """The processes that train now, by rank."""
        found = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                try:
                    variables = (entry / "environ").read_bytes().split(b"\0")
                    words = (entry / "cmdline").read_bytes().split(b"\0")
                except OSError:
                    continue
                ranks = [v.removeprefix(b"RANK=") for v in variables if v.startswith(b"RANK=")]
                if ranks and b"launch.ranks.rank" in words and str(self.run).encode() in words:
                    found[int(ranks[0])] = int(entry.name)
        return [found[rank] for rank in sorted(found)]

    def rank_pid(self, rank: int) -> int:
        return self.rank_pids()[rank]

    def check_requeued(self, times: int = 1) -> None:
        """So many attempts ended, each was queued again, and the run went on to the end.

        A later attempt may have been asked to stop as well: SLURM sends what ends a step again, a minute later, where a
        node was slow to answer; by then the next attempt has a step of that number.
        """
        events = JobFolder(self.run).events()
        names = [event["event"] for event in events]
        again = ["start", "end", "requeue"]
        assert names == again * (len(names) // 3 - 1) + ["start", "end", "done"], self.told()
        assert names[: 3 * times] == again * times, self.told()
        further = [event for event in events[3 * times : -3] if event["event"] == "end"]
        assert all(event["status"] == STOPPED for event in further), self.told()

    def ends(self) -> list[dict[str, Any]]:
        """How each attempt ended."""
        return [event for event in JobFolder(self.run).events() if event["event"] == "end"]

    def check_whole(self, expected: dict[int, float]) -> None:
        """It is done, and every step's loss is the uninterrupted run's to the bit."""
        assert self.events()[-1] == "done", self.told()
        assert losses(self.run) == expected
        assert (self.run / "encoder" / "model.safetensors").is_file()
