"""What runs on each node of a job: it finds the other nodes, starts this node's ranks, and reports how they ended.

`SubmittedJob` is all that submitit pickles. Ranks are children of this process, so that it answers signals, and
reports, whatever state they are in: blocked in a collective, stopped, dead. `after_job` then decides, once for all
nodes, what comes next.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from data_pipeline.datasets.read import open_dataset
from data_pipeline.datasets.training import open_training
from data_pipeline.durable import write_text
from data_pipeline.errors import InputError, PretrainError
from launch.jobs.batch import AFTER_JOB
from launch.jobs.eval_jobs import EvalJobs, are_separate
from launch.jobs.folder import JobFolder
from launch.jobs.node import Node
from launch.jobs.rendezvous import Rendezvous, host_rendezvous, join_rendezvous, verify_shared_folder
from launch.jobs.telling import tell
from launch.ranks.launcher import Place, launch
from launch.slurm.cluster import Cluster, load_cluster
from launch.slurm.commands import job_fields, kill_wait_seconds
from pretrain.recipe.files import load_recipe
from pretrain.recipe.recipe import Data
from pretrain.recipe.resolve import resolve
from pretrain.runtime.signals import LEAD_SECONDS
from pretrain.train_options import TrainOptions

# A scheduler asks for an end by SIGTERM (preemption, requeue, cancellation) and warns of the time limit by SIGUSR2.
PASSED_ON: dict[int, int] = {signal.SIGTERM: signal.SIGUSR2}


class SubmittedJob:
    """The call that submitit makes on each node. It carries two strings and nothing else.

    Args:
        run: the run's folder.
        token: of the submission; a node that finds another one, or none, does not see that folder.
    """

    after_module = AFTER_JOB  # what the batch script runs once all nodes have ended

    def __init__(self, run: str, token: str) -> None:
        self.run, self.token = run, token

    def __call__(self) -> None:
        status = run_node(Path(self.run), self.token, self.was_done)
        if "SLURM_JOB_ID" not in os.environ:  # there a batch script does it
            from launch.jobs.after_job import main

            main(Path(self.run), status)
        sys.exit(status)  # past what submitit would pickle

    def was_done(self, folder: JobFolder) -> bool:
        """Returns whether nothing is left to do; called on the first node. A run finds that out for itself."""
        return False


def run_node(run: Path, token: str, was_done: Callable[[JobFolder], bool] = lambda folder: False) -> int:
    """Runs this node's part of an attempt. Returns its exit status: those of `python -m pretrain`."""
    node, folder = Node.from_environment(), JobFolder(run)
    try:
        verify_shared_folder(folder, token, node)
        submitted = folder.submitted()
        if node.index == 0:
            rendezvous = host_rendezvous(folder, node, was_done(folder))
        else:
            rendezvous = join_rendezvous(folder, node)
        if rendezvous.done:
            status = 0
        elif words := submitted.get("words"):
            status = _run_command(words, load_cluster(folder.cluster), rendezvous)
        else:
            return _run_share(folder, node, rendezvous)
    except (PretrainError, OSError) as error:  # such as a disk that is full
        why = str(error) if isinstance(error, PretrainError) else f"{run} on {node.name}: {error}"
        status = error.exit_status if isinstance(error, PretrainError) else 1
        tell(f"error: {why}", error=True)
        _report(run, node, status, why)
        return status
    _report(run, node, status, "")
    return status


def _run_share(folder: JobFolder, node: Node, rendezvous: Rendezvous) -> int:
    """Runs this node's ranks, and on the first one queues the evaluations that jobs of their own do."""
    run, recipe, cluster = folder.run, load_recipe(folder.recipe), load_cluster(folder.cluster)
    _check_data(recipe.data, node)
    separate = are_separate(recipe.evals, cluster)
    requires_gpu = bool(cluster.gpus_per_node) and recipe.runtime.device == "auto"
    arguments = _rank_arguments(folder, separate, requires_gpu)
    if node.index or not separate:
        status = _run_ranks(arguments, recipe.runtime.threads, cluster, node, rendezvous)
        _report(run, node, status, "")
        return status
    num_samples = open_training(recipe.data.train, recipe.data.cache).num_samples
    evaluations = EvalJobs(run, recipe.evals, resolve(recipe, cluster.world_size, num_samples))
    with evaluations.while_training():
        status = _run_ranks(arguments, recipe.runtime.threads, cluster, node, rendezvous)
    for signum in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)  # what is left to do is short, and nobody would pass them on
    _report(run, node, status, "")
    if status == 0:  # else the next attempt sees what is due
        evaluations.finish()
    return status


def _run_command(words: list[str], cluster: Cluster, rendezvous: Rendezvous) -> int:
    """Runs `pretrain WORDS`. What trains in it saves first when it is asked to stop; all else ends at once, and goes on
    from what it finished, or begins again.
    """
    place = Place(environment=_rank_environment(cluster, rendezvous))
    return launch(
        words, 1, module="launch.cli", place=place, passed_on=PASSED_ON, second_ends=False, seconds_left=_seconds_left()
    )


def _rank_environment(cluster: Cluster, rendezvous: Rendezvous) -> dict[str, str]:
    """Returns the variables by which ranks know the job that they are part of."""
    return {"PRETRAIN_ATTEMPT": str(rendezvous.attempt), LEAD_SECONDS: str(cluster.signal_lead_seconds)}


def _seconds_left() -> Callable[[int], float | None]:
    """Returns the function that `launch` takes under that name."""
    kill_wait = kill_wait_seconds() if "SLURM_JOB_ID" in os.environ else None  # asked before there is any hurry
    return lambda signum: kill_wait / 2 if kill_wait and _is_time_limit(signum) else None


def _rank_arguments(folder: JobFolder, evals_separate: bool, requires_gpu: bool) -> list[str]:
    """Returns the arguments of `python -m pretrain`.

    Args:
        evals_separate: jobs of their own evaluate.
        requires_gpu: the ranks were given GPUs: a node whose driver is ill must not train on its CPUs.
    """
    options = TrainOptions(
        out=folder.run,
        overrides=("runtime.device=cuda",) if requires_gpu else (),
        max_steps=folder.submitted().get("max_steps"),
        evals_apart=evals_separate,
    )
    return [str(folder.recipe), *options.words()]


def _run_ranks(arguments: list[str], threads: int | None, cluster: Cluster, node: Node, rendezvous: Rendezvous) -> int:
    """Runs the ranks of this node and returns their exit status, as of `launch`."""
    return launch(
        arguments,
        cluster.ranks_per_node,
        threads=threads,
        place=Place(
            first_rank=node.index * cluster.ranks_per_node,
            world_size=node.count * cluster.ranks_per_node,
            master=(rendezvous.address, rendezvous.port),
            environment=_rank_environment(cluster, rendezvous),
        ),
        passed_on=PASSED_ON,
        second_ends=False,
        seconds_left=_seconds_left(),
    )


def _is_time_limit(signum: int) -> bool:
    """Returns whether SLURM asks for an end because the time is over: with the ranks it will soon kill what would queue
    the job again. For its other signals there is more time.
    """
    if signum != signal.SIGTERM:
        return False
    try:
        fields = job_fields(os.environ["SLURM_JOB_ID"])
    except PretrainError:
        return False
    return fields is not None and fields.get("Reason") == "TimeLimit"


def _check_data(data: Data, node: Node) -> None:
    """Checks that this node sees the data; raises InputError where it does not."""
    cache = data.cache
    try:
        open_training(data.train, cache)
        if data.val is not None:
            open_dataset(data.val, cache)
    except PretrainError as error:
        raise InputError(f"{error.where} on {node.name}", error.expected, error.found, error.fix) from None


def _report(run: Path, node: Node, status: int, why: str) -> None:
    """Writes down how this node's part ended, for `after_job`."""
    folder = node.folder(run)
    try:
        if folder.is_dir():
            write_text(folder / f"{node.name}.json", json.dumps({"status": status, "why": why, "at": time.time()}))
    except OSError as failed:
        tell(f"error: {folder} takes no word of how {node.name} ended: {failed}", error=True)
