"""What runs on each node of a job: it finds the other nodes, starts this node's ranks, and says what became of them.

`Job` is all that submitit pickles. Ranks are children of this process, so that it answers signals, and reports, however
they are: blocked in a collective, stopped, dead. `after_job` then decides, once for all nodes, what comes next.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.durable import write_text
from data_pipeline.errors import InputError, PretrainError, RunError
from launch.chains.config import Stage
from launch.chains.folder import ChainFolder
from launch.jobs.eval_jobs import EvalJobs, apart
from launch.jobs.folder import JobFolder
from launch.ranks.launcher import Place, free_port, launch
from launch.slurm.cluster import Cluster, load_cluster
from launch.slurm.commands import fields_of, job_fields, kill_wait_seconds, slurm
from pretrain.recipe.files import load_recipe
from pretrain.recipe.recipe import Recipe
from pretrain.runtime.signals import LEAD_SECONDS

MEETING_SECONDS = 45  # for nodes to hear of each other, within the first minute: all are started at once
_MEETING_AGAIN_SECONDS = 180  # when they have done so before: storage may be slow to show files, a node slow to start
FRUITLESS = 3  # attempts without a newer checkpoint, after which what SLURM itself queues again is not begun
# A scheduler asks for an end by SIGTERM (preemption, requeue, cancellation) and warns of the time limit by SIGUSR2.
PASSED_ON: dict[int, int] = {signal.SIGTERM: signal.SIGUSR2}


class Job:
    """Called by submitit on each node. It carries two strings and nothing else.

    Args:
        run: the run's folder.
        token: of the submission; a node that finds another one, or none, does not see that folder.
    """

    def __init__(self, run: str, token: str) -> None:
        self.run, self.token = run, token

    def __call__(self) -> None:
        status = run_node(Path(self.run), self.token)
        if "SLURM_JOB_ID" not in os.environ:  # there a batch script does it
            from launch.jobs.after_job import main

            main(Path(self.run), status)
        sys.exit(status)  # past what submitit would pickle


@dataclass(frozen=True)
class Node:
    """This node among those of the job."""

    name: str
    index: int
    count: int
    job_id: str
    restart: int  # how many times this job was queued again

    @classmethod
    def from_environment(cls) -> Node:
        if "SLURM_JOB_ID" not in os.environ:
            return cls(socket.gethostname(), 0, 1, os.environ.get("SUBMITIT_LOCAL_JOB_ID", str(os.getpid())), 0)
        return cls(
            name=os.environ.get("SLURMD_NODENAME", socket.gethostname()),
            index=int(os.environ.get("SLURM_NODEID", 0)),
            count=int(os.environ.get("SLURM_JOB_NUM_NODES", 1)),
            job_id=os.environ["SLURM_JOB_ID"],
            restart=int(os.environ.get("SLURM_RESTART_COUNT", 0)),
        )

    @property
    def patience_seconds(self) -> float:
        return _MEETING_AGAIN_SECONDS if self.restart else MEETING_SECONDS

    def folder(self, run: Path) -> Path:
        """Where this attempt's nodes leave word."""
        return attempt_folder(run, self.job_id, self.restart)


def attempt_folder(run: Path, job_id: str, restart: int) -> Path:
    return JobFolder(run).path / "attempts" / f"{job_id}-{restart}"


def run_node(run: Path, token: str) -> int:
    """This node's part of an attempt. Returns its exit status: those of `python -m pretrain`."""
    node, folder = Node.from_environment(), JobFolder(run)
    try:
        _see(folder, token, node)
        submitted = folder.submitted()
        meeting = _host(folder, node, _was_done(submitted)) if node.index == 0 else _meet(folder, node)
        if meeting["done"]:
            status = 0
        elif words := submitted.get("words"):
            status = _run_command(words, load_cluster(folder.cluster), meeting)
        else:
            return _run_share(folder, node, meeting)
    except PretrainError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        _report(run, node, error.exit_status, str(error))
        return error.exit_status
    _report(run, node, status, "")
    return status


def _run_share(folder: JobFolder, node: Node, meeting: dict[str, Any]) -> int:
    """This node's ranks, and on the first one the evaluations that others do for them."""
    run, recipe, cluster = folder.run, load_recipe(folder.recipe), load_cluster(folder.cluster)
    _check_data(recipe, node)
    if node.index or not apart(recipe, cluster):
        status = _run_ranks(run, recipe, cluster, node, meeting)
        _report(run, node, status, "")
        return status
    evaluations = EvalJobs(run, recipe, cluster)
    with evaluations.while_training():
        status = _run_ranks(run, recipe, cluster, node, meeting)
    for signum in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)  # what is left to do is short, and nobody would pass them on
    _report(run, node, status, "")
    if status == 0:  # else the next attempt sees what is due
        evaluations.finish()
    return status


def _was_done(submitted: Mapping[str, Any]) -> bool:
    """Whether the job is for a stage of a chain that is done; else it is written down as begun.

    Raises:
        InputError: it was begun with other settings or inputs.
    """
    if submitted.get("chain") is None:
        return False
    chain, stage = stage_of(submitted["chain"])
    return chain.is_done(stage)


def stage_of(what: Mapping[str, str]) -> tuple[ChainFolder, Stage]:
    """Of what `pretrain chain --cluster` wrote down of a job."""
    chain = ChainFolder.of(Path(what["file"]), Path(what["out"]))
    return chain, chain.stage(what["stage"])


def _run_command(words: list[str], cluster: Cluster, meeting: dict[str, Any]) -> int:
    """`pretrain WORDS`. Asked to stop, what trains in it saves first; all else ends at once: it goes on from what it
    finished, or begins again.
    """
    place = Place(environment=_of_attempt(cluster, meeting))
    return launch(words, 1, module="launch.cli", place=place, passed_on=PASSED_ON, seconds_left=_seconds_left())


def _of_attempt(cluster: Cluster, meeting: dict[str, Any]) -> dict[str, str]:
    """What ranks are told of the job that they are part of."""
    return {"PRETRAIN_ATTEMPT": str(meeting["attempt"]), LEAD_SECONDS: str(cluster.signal_lead_seconds)}


def _seconds_left() -> Callable[[int], float | None]:
    """For `launch`."""
    kill_wait = kill_wait_seconds() if "SLURM_JOB_ID" in os.environ else None  # asked before there is any hurry
    return lambda signum: kill_wait / 2 if kill_wait and _is_time_limit(signum) else None


def _run_ranks(run: Path, recipe: Recipe, cluster: Cluster, node: Node, meeting: dict[str, Any]) -> int:
    max_steps = JobFolder(run).submitted().get("max_steps")
    arguments = [str(JobFolder(run).recipe), "--out", str(run)]
    arguments += ["--max-steps", str(max_steps)] if max_steps else []
    arguments += ["--evals-apart"] if apart(recipe, cluster) else []
    if cluster.gpus_per_node and recipe.runtime.device == "auto":
        arguments += ["--set", "runtime.device=cuda"]  # a node whose driver is ill must not train on its CPUs
    return launch(
        arguments,
        cluster.ranks_per_node,
        threads=recipe.runtime.threads,
        place=Place(
            first_rank=node.index * cluster.ranks_per_node,
            world_size=node.count * cluster.ranks_per_node,
            master=(meeting["address"], meeting["port"]),
            environment=_of_attempt(cluster, meeting),
        ),
        passed_on=PASSED_ON,
        seconds_left=_seconds_left(),
    )


def _is_time_limit(signum: int) -> bool:
    """Whether SLURM asks for an end because the time is over: with the ranks it will soon kill what would queue the job
    again. For its other signals there is more time.
    """
    if signum != signal.SIGTERM:
        return False
    try:
        fields = job_fields(os.environ["SLURM_JOB_ID"])
    except PretrainError:
        return False
    return fields is not None and fields.get("Reason") == "TimeLimit"


def _see(folder: JobFolder, token: str, node: Node) -> None:
    """That this node sees what was submitted: a folder of the same name on its own disk is another one."""
    try:
        found = folder.submitted().get("token")
    except InputError:
        found = None
    if found != token:
        raise InputError(
            where=f"{folder.run} on {node.name}", expected="the run's folder, as the login node sees it",
            found="another one" if found else "nothing", fix="Choose an --out on storage that all nodes share.",
        )  # fmt: skip
    node.folder(folder.run).mkdir(parents=True, exist_ok=True)
    (node.folder(folder.run) / f"{node.name}.joined").touch()


def _check_data(recipe: Recipe, node: Node) -> None:
    from data_pipeline.datasets.mixture import open_training
    from data_pipeline.datasets.read import open_dataset

    cache = recipe.data.cache.spec()
    try:
        open_training(recipe.data.train, cache)
        if recipe.data.val is not None:
            open_dataset(recipe.data.val, cache)
    except PretrainError as error:
        raise InputError(f"{error.where} on {node.name}", error.expected, error.found, error.fix) from None


def _host(folder: JobFolder, node: Node, done: bool) -> dict[str, Any]:
    """The first node says where all meet, and that an attempt has begun; or that there is nothing left to do."""
    names = _names(node)
    meeting = {"address": _address(node), "port": free_port(), "attempt": folder.num_attempts(), "done": done}
    step = folder.newest_step()
    folder.note("start", attempt=meeting["attempt"], job_id=node.job_id, nodes=names, restart=node.restart, step=step)
    _refuse_more(folder, node)
    _await(folder, node, names)
    write_text(node.folder(folder.run) / "meeting.json", json.dumps(meeting))
    return meeting


def _refuse_more(folder: JobFolder, node: Node) -> None:
    """Bounds what SLURM queues again by itself, after preemptions and lost nodes, as `after_job` bounds the rest.

    Raises:
        InputError: that was too often, or without getting further.
    """
    most, before = load_cluster(folder.cluster).max_requeues, folder.fruitless(node.job_id) - 1
    if node.restart > most:
        raise InputError(
            where=f"job {node.job_id}", expected=f"at most {most} requeues (max_requeues)", found=f"{node.restart}",
            fix="Submitted again, it goes on.",
        )  # fmt: skip
    if before >= FRUITLESS and not folder.submitted().get("words"):  # a command has no checkpoints to count
        raise InputError(
            where=f"job {node.job_id}", expected=f"a new checkpoint within {FRUITLESS} attempts",
            found=f"none since step {folder.newest_step()}",
            fix="See the log for what ended them: the run may kill its node. Submitted again, it goes on.",
        )  # fmt: skip


def _await(folder: JobFolder, node: Node, names: list[str]) -> None:
    """All nodes: one that does not see the folder cannot say so."""
    deadline = time.monotonic() + node.patience_seconds
    while absent := [name for name in names if not (node.folder(folder.run) / f"{name}.joined").exists()]:
        if time.monotonic() > deadline:
            raise InputError(
                where=f"{folder.run} on {', '.join(absent)}", found="none",
                expected=f"the run's folder, and word of the node within {node.patience_seconds:g} s",
                fix="Choose an --out on storage that all nodes share; see the log for what became of the node.",
            )  # fmt: skip
        time.sleep(0.2)


def _meet(folder: JobFolder, node: Node) -> dict[str, Any]:
    path = node.folder(folder.run) / "meeting.json"
    deadline = time.monotonic() + node.patience_seconds
    while time.monotonic() < deadline:
        try:
            return dict(json.loads(path.read_bytes()))
        except FileNotFoundError:
            time.sleep(0.2)
    raise RunError(
        where=f"{path} on {node.name}", found="none",
        expected=f"word of the job's first node within {node.patience_seconds:g} s",
        fix="See the log for what became of it; the run's folder must be on storage that all nodes share.",
    )  # fmt: skip


def _address(node: Node) -> str:
    """Under which SLURM itself finds this node; a name that only it knows would not do."""
    if node.count == 1:
        return "127.0.0.1"
    try:
        return fields_of(slurm("scontrol", "show", "node", "-o", node.name))["NodeAddr"]
    except (PretrainError, KeyError):
        return socket.gethostname()


def _names(node: Node) -> list[str]:
    if node.count == 1:
        return [node.name]
    try:
        return slurm("scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]).split()
    except (PretrainError, KeyError):
        return [node.name]


def _report(run: Path, node: Node, status: int, why: str) -> None:
    folder = node.folder(run)
    if folder.is_dir():
        write_text(folder / f"{node.name}.json", json.dumps({"status": status, "why": why, "at": time.time()}))
