"""`pretrain submit` checks everything that can be known beforehand, copies the code, and queues a job.

Imports no torch: a login node is no place for it.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable
from pathlib import Path

from data_pipeline.datasets.read import open_dataset
from data_pipeline.datasets.training import open_training
from data_pipeline.errors import RecipeError
from launch.jobs.queue import PlannedJob
from launch.jobs.submission import submit_jobs
from launch.slurm.cluster import Cluster, load_cluster
from pretrain.evals.config import ProtocolConfig
from pretrain.recipe.files import dump, load_recipe, print_note
from pretrain.recipe.recipe import Data
from pretrain.recipe.resolve import resolve


def submit(
    recipe_path: Path,
    cluster_path: Path,
    *,
    out: Path | None = None,
    nodes: int | None = None,
    overrides: list[str] | None = None,
    dry_run: bool = False,
    local: bool = False,
    max_steps: int | None = None,
) -> None:
    """Queues a run, or goes on with one whose job has ended; says where it is kept and how to follow it.

    Args:
        recipe_path: frozen beside the run with its overrides: later changes of the file do not reach the job.
        cluster_path: the cluster file.
        out: the run's folder, on storage that all nodes see; None: `runs/<name>`.
        nodes: another number than the cluster file's. The global batch is the recipe's in any case.
        overrides: keys of the recipe that are given other values.
        dry_run: print the batch script; write and start nothing.
        local: run the same job here, by submitit's local executor.
        max_steps: the run stops after so many steps.

    Raises:
        InputError: something is wrong; nothing was written or started.
        RunError: SLURM refused the job.
    """
    recipe, cluster = load_recipe(recipe_path, overrides, note=print_note), load_cluster(cluster_path)
    cluster = Cluster.model_validate({**cluster.model_dump(), **({"nodes": nodes} if nodes else {})})
    run = (out or Path("runs") / recipe.name).resolve()
    resolve(recipe, cluster.world_size, open_training(recipe.data.train, recipe.data.cache).num_samples)
    _check_other_data(recipe.data, recipe.evals, cluster.world_size, recipe.name)
    if local and cluster.nodes > 1:
        found = f"nodes: expected 1 with --local, found {cluster.nodes}. Use --nodes 1."
        raise RecipeError(str(cluster_path), [found])
    record = {"recipe": str(recipe_path), "overrides": overrides or [], "cluster": str(cluster_path)}
    job = PlannedJob(run, recipe.name, cluster, {**record, "max_steps": max_steps}, dump(recipe))
    submit_jobs([job], cluster_path, run, dry_run=dry_run, local=local, tell=_tell)


def _tell(job: PlannedJob, job_id: str) -> None:
    cluster, shown = job.cluster, shlex.quote(os.path.relpath(job.folder))
    print(
        f"job {job_id}: {cluster.nodes} x {cluster.ranks_per_node} ranks, at most {cluster.time_minutes} minutes a time"
    )
    print(f"run: {job.folder}")
    print(f"follow it: pretrain logs {shown} --follow; pretrain status {shown}; stop it: pretrain cancel {shown}")


def _check_other_data(data: Data, evals: Iterable[ProtocolConfig], world_size: int, name: str) -> None:
    """Checks that the data are there with which a run is validated and evaluated.

    Args:
        name: of the recipe, for messages.
    """
    cache = data.cache
    if data.val is not None and open_dataset(data.val, cache).num_samples < world_size:
        problem = f"data.val: expected a sample for each of {world_size} processes, found fewer."
        raise RecipeError(name, [problem])
    for path in {path for config in evals for path in config.datasets}:
        open_dataset(path, cache)
