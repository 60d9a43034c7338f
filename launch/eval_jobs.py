"""`evals` of a recipe as small jobs of their own (`evals_apart` of the cluster file): training never waits for them.

The first node's agent looks for new checkpoints and has each one that is due judged. The job's checkpoint is held by
hard links in `RUN/held`, so that the run may remove its own; what was found stands where training would have put it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_pipeline.mixture import open_training
from launch.cluster import Cluster
from launch.job_folder import JobFolder
from pretrain.recipe import Recipe
from pretrain.resolve import resolve
from pretrain.run_folder import complete_checkpoints, eval_name, step_of

_LOOK_SECONDS = 5.0
_OF_THIS_JOB = ("SLURM_", "SBATCH_", "SUBMITIT_", "PRETRAIN_")  # variables that another job must not inherit


@contextmanager
def eval_jobs(run: Path, recipe: Recipe, cluster: Cluster) -> Iterator[None]:
    """Queues a job for each evaluation that falls due while the block runs; nothing where training does them."""
    if not apart(recipe, cluster):
        yield
        return
    over = threading.Event()
    due = Due(run, recipe, cluster)

    def look() -> None:
        while not over.wait(_LOOK_SECONDS):
            due.look()

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        due.look()


def apart(recipe: Recipe, cluster: Cluster) -> bool:
    """Whether evaluations are jobs; SLURM alone has a queue for them."""
    return cluster.evals_apart and bool(recipe.evals) and "SLURM_JOB_ID" in os.environ


class Due:
    """Which checkpoints of a run are to be judged, by each entry of `evals`."""

    def __init__(self, run: Path, recipe: Recipe, cluster: Cluster) -> None:
        data = recipe.data
        plan = resolve(recipe, cluster.world_size, open_training(data.train, data.cache.spec()).num_samples)
        self._run, self._total = run, plan.total_steps
        self._tried: set[tuple[int, int]] = set()
        self._every = [max(1, round(config.every_epochs * plan.steps_per_epoch)) for config in recipe.evals]

    def entries(self) -> list[tuple[int, int]]:
        """Index of an entry, and step of the first checkpoint from a multiple of its `every_epochs` on, or the last."""
        found = []
        for index, every in enumerate(self._every):
            queued = self._run.glob(f"evals/{eval_name(index)}_step_*.job")
            last = max((int(path.stem.rpartition("_")[2]) for path in queued), default=0)
            for checkpoint in complete_checkpoints(self._run / "checkpoints"):
                step = step_of(checkpoint)
                if step > last and (step // every > last // every or step >= self._total):
                    found.append((index, step))
                    last = step
        return found

    def look(self) -> None:
        """Queues what is due, once each. What goes wrong is told: training does not end of it."""
        environment = {
            key: value for key, value in os.environ.items() if key == "SLURM_CONF" or not key.startswith(_OF_THIS_JOB)
        }
        for index, step in set(self.entries()) - self._tried:
            self._tried.add((index, step))
            command = [sys.executable, "-m", "launch.eval_submit", str(self._run), str(index), str(step)]
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            print((done.stdout + done.stderr).strip(), flush=True)


def let_go(held: Path, run: Path) -> None:
    """Removes a checkpoint that was held, once no other job needs it."""
    waiting = [JobFolder(path) for path in run.glob(f"evals/*_{held.name}.job")]
    if all(job.events() and job.events()[-1]["event"] in ("done", "stop", "cancel") for job in waiting):
        shutil.rmtree(held, ignore_errors=True)
