"""A recipe's `evals` as small jobs of their own (`evals_apart` of the cluster file): training never waits for them.

The first node's agent looks for new checkpoints and has those judged that are due. The job's checkpoint is held by hard
links in `RUN/held_<entry>`, so that the run may remove its own; the report stands where training would have put it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from data_pipeline.errors import RunError
from launch.jobs.folder import JobFolder
from launch.jobs.record import load_job
from launch.ranks.child import child_environment, python_command
from launch.slurm.cluster import Cluster
from launch.slurm.commands import AT_WORK, WAITING, job_states
from pretrain.evals.config import ProtocolConfig
from pretrain.recipe.resolve import Resolved
from pretrain.runtime.run_folder import COMPLETE, complete_checkpoints, eval_name, folder_name, step_of

_LOOK_SECONDS = 1.0  # a run keeps as few as one checkpoint, and a small one saves every few seconds
_SUBMIT_SECONDS = 120.0
_TRIES, _PAUSE_SECONDS = 3, 20.0  # where SLURM does not take a job: its controller may be busy


def are_separate(evals: Sequence[ProtocolConfig], cluster: Cluster) -> bool:
    """Returns whether a recipe's `evals` are jobs of their own; SLURM alone has a queue for them."""
    return cluster.evals_apart and bool(evals) and "SLURM_JOB_ID" in os.environ


class EvalJobs:
    """Queues a job for each evaluation that is due.

    Args:
        run: the run's folder.
        evals: the recipe's.
        plan: the run's number of steps, and of steps in an epoch.
    """

    def __init__(self, run: Path, evals: Sequence[ProtocolConfig], plan: Resolved) -> None:
        self._run, self._total = run, plan.total_steps
        self._every = [max(1, round(config.every_epochs * plan.steps_per_epoch)) for config in evals]
        self._names = [eval_name(index, config.kind) for index, config in enumerate(evals)]
        self._tries: Counter[tuple[int, int]] = Counter()
        self._rests_until = 0.0  # after a try that failed
        self._lock = threading.Lock()

    @contextmanager
    def while_training(self) -> Iterator[None]:
        """Looks for new checkpoints every few seconds for as long as the block runs."""
        over = threading.Event()

        def keep_looking() -> None:
            while not over.wait(_LOOK_SECONDS):
                self.look()

        threading.Thread(target=keep_looking, daemon=True).start()
        try:
            yield
        finally:
            over.set()

    def due(self) -> list[tuple[int, int]]:
        """Returns the index of each entry that is due, and the step of the newest checkpoint: the checkpoint is the
        first in a period of its `every_epochs`, or the last of all. A period whose turn comes while the entry's last
        job still waits in the queue is passed over.
        """
        checkpoints = complete_checkpoints(self._run / "checkpoints")
        if not checkpoints:
            return []
        step, found = step_of(checkpoints[-1]), []
        for index, every in enumerate(self._every):
            jobs = {
                int(path.stem.rpartition("_")[2]): path for path in _queued(self._run, f"{self._names[index]}_step_*")
            }
            last = max(jobs, default=0)
            if last in jobs and (job := load_job(jobs[last])) is not None and not job.released:
                last = max(jobs.keys() - {last}, default=0)  # what queued it was killed
            waits = last in jobs and not JobFolder(jobs[last]).events()
            if step > last and (step >= self._total or (step // every > last // every and not waits)):
                found.append((index, step))
        return found

    def look(self) -> bool:
        """Queues what is due, after a pause again where that fails. Failures are printed, and training goes on.

        Returns whether all went well.
        """
        with self._lock:
            if time.monotonic() < (before := self._rests_until):
                return False
            due: list[tuple[int, int]] = []
            with self._printing_errors():
                due = [one for one in self.due() if self._tries[one] < _TRIES]
            for index, step in due:  # all at once: to queue one takes seconds
                with self._printing_errors():
                    hold(self._run, self._names[index], step)
            for index, step in due:
                self._tries[index, step] += 1
                with self._printing_errors():
                    self._queue(index, step)
            if due:
                with self._printing_errors():
                    _release_finished(self._run)
            return self._rests_until == before

    def finish(self) -> None:
        """Looks a last time, and again as often as may be where that fails, as nobody looks later."""
        for _ in range(_TRIES):
            time.sleep(max(0.0, self._rests_until - time.monotonic()))
            if self.look():
                return

    @contextmanager
    def _printing_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            print(f"evaluations: {error!r}", file=sys.stderr, flush=True)
            self._rests_until = time.monotonic() + _PAUSE_SECONDS

    def _queue(self, index: int, step: int) -> None:
        """Queues an evaluation; raises RunError where that fails."""
        command = python_command("launch.jobs.eval_submit", str(self._run), str(index), str(step))
        # In a session of its own: a signal to all processes of this job is not for it.
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_SUBMIT_SECONDS, start_new_session=True,
            env=child_environment(os.environ),
        )  # fmt: skip
        print((done.stdout + done.stderr).strip(), flush=True)
        if done.returncode:
            raise RunError(f"evaluation of step {step}", "a job of its own", "none, see above")


def hold(run: Path, entry: str, step: int) -> Path:
    """Gives a checkpoint's files a second name: no bytes are copied, and none are lost when the first name goes.

    Args:
        run: the run's folder.
        entry: name of the entry of `evals` (`eval_name`) for which the checkpoint is held.
        step: of the checkpoint.

    Raises:
        RunError: the checkpoint is gone already, or files cannot have two names there.
    """
    checkpoint = run / "checkpoints" / folder_name(step)
    held = run / f"held_{entry}" / folder_name(step)
    if held.is_dir():
        return held
    unfinished = held.with_name(f".{held.name}.{os.getpid()}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        shutil.copytree(checkpoint, unfinished, copy_function=os.link)
        (unfinished / COMPLETE).stat()  # the first that goes when it is removed
        os.rename(unfinished, held)
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise RunError(
            where=str(checkpoint), expected="a checkpoint to hold by hard links until it is judged", found=str(error),
            fix="Keep more checkpoints (checkpoint.keep_last), or leave evals_apart where storage has no hard links.",
        ) from None  # fmt: skip
    return held


def release(held: Path) -> None:
    """Removes the second names that `hold` gave."""
    shutil.rmtree(held, ignore_errors=True)


def _queued(run: Path, pattern: str) -> list[Path]:
    """Returns the folders of jobs that SLURM has taken."""
    found = list(run.glob(f"evals/{pattern}.job"))
    return [path for path in found if (path / "job/submitted.json").is_file() and JobFolder(path).submitted()["job_id"]]


def _release_finished(run: Path) -> None:
    """Releases what finished jobs held, also those that could not say how they ended."""
    for held in run.glob("held_*/step_*"):
        entry = held.parent.name.removeprefix("held_")
        ids = [str(JobFolder(path).submitted()["job_id"]) for path in _queued(run, f"{entry}_{held.name}")]
        states = job_states(ids)
        if states is not None and not any(state in (*WAITING, *AT_WORK) for state in states.values()):
            release(held)
