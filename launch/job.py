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
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.durable import durable_file
from data_pipeline.errors import InputError, PretrainError, RunError
from launch.chain_folder import ChainFolder
from launch.chain_recipe import Stage
from launch.cluster import Cluster, load_cluster
from launch.eval_jobs import apart, eval_jobs
from launch.job_folder import JobFolder
from launch.local import Place, free_port, launch
from launch.slurm import fields_of, job_fields, kill_wait_seconds, slurm
from pretrain.demand import LEAD_SECONDS, STOPPED
from pretrain.recipe import Recipe
from pretrain.recipe_io import load_recipe

MEETING_SECONDS = 120  # for the first node to say where it is: all are started at once, storage may be slow
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
            from launch.after_job import main

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
        if node.index == 0 and _was_done(submitted):
            _host(folder, node)
            status = 0
        elif words := submitted.get("words"):
            _host(folder, node)
            status = _run_command(words)
        else:
            recipe, cluster = load_recipe(folder.recipe), load_cluster(folder.cluster)
            _check_data(recipe, node)
            meeting = _host(folder, node) if node.index == 0 else _meet(folder, node)
            with eval_jobs(run, recipe, cluster) if node.index == 0 else nullcontext():
                status = _run_ranks(run, recipe, cluster, node, meeting)
    except PretrainError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        _report(run, node, error.exit_status, str(error))
        return error.exit_status
    _report(run, node, status, "")
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


def _run_command(words: list[str]) -> int:
    """`pretrain WORDS`. Asked to stop it does so at once: it goes on from what it finished, or begins again."""
    status = launch(words, 1, module="launch.cli", passed_on={signal.SIGUSR2: signal.SIGTERM})
    return STOPPED if status == 128 + signal.SIGTERM else status


def _run_ranks(run: Path, recipe: Recipe, cluster: Cluster, node: Node, meeting: dict[str, Any]) -> int:
    max_steps = JobFolder(run).submitted().get("max_steps")
    arguments = [str(JobFolder(run).recipe), "--out", str(run)]
    arguments += ["--max-steps", str(max_steps)] if max_steps else []
    arguments += ["--set=evals=[]"] if apart(recipe, cluster) else []
    return launch(
        arguments,
        cluster.ranks_per_node,
        threads=recipe.runtime.threads,
        place=Place(
            first_rank=node.index * cluster.ranks_per_node,
            world_size=node.count * cluster.ranks_per_node,
            master=(meeting["address"], meeting["port"]),
            environment={"PRETRAIN_ATTEMPT": str(meeting["attempt"]), LEAD_SECONDS: str(cluster.signal_lead_seconds)},
        ),
        passed_on=PASSED_ON,
        seconds_left=_seconds_left,
    )


def _seconds_left(signum: int) -> float | None:
    """At its time limit SLURM asks a job to end, and soon kills all of it, and with it what would queue it again."""
    job_id = os.environ.get("SLURM_JOB_ID")
    if signum != signal.SIGTERM or job_id is None:
        return None
    try:
        fields = job_fields(job_id)
        return kill_wait_seconds() / 2 if fields is not None and fields.get("Reason") == "TimeLimit" else None
    except PretrainError:
        return None


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
    from data_pipeline.mixture import open_training
    from data_pipeline.read import open_dataset

    cache = recipe.data.cache.spec()
    try:
        open_training(recipe.data.train, cache)
        if recipe.data.val is not None:
            open_dataset(recipe.data.val, cache)
    except PretrainError as error:
        raise InputError(f"{error.where} on {node.name}", error.expected, error.found, error.fix) from None


def _host(folder: JobFolder, node: Node) -> dict[str, Any]:
    """The first node says where all meet, and that an attempt has begun."""
    meeting = {"address": _address(node), "port": free_port(), "attempt": folder.num_attempts()}
    folder.note("start", attempt=meeting["attempt"], job_id=node.job_id, nodes=_names(node), restart=node.restart)
    with durable_file(node.folder(folder.run) / "meeting.json") as file:
        file.write(json.dumps(meeting).encode())
    return meeting


def _meet(folder: JobFolder, node: Node) -> dict[str, Any]:
    path = node.folder(folder.run) / "meeting.json"
    deadline = time.monotonic() + MEETING_SECONDS
    while time.monotonic() < deadline:
        try:
            return dict(json.loads(path.read_bytes()))
        except FileNotFoundError:
            time.sleep(0.2)
    raise RunError(
        where=f"{path} on {node.name}", found="none",
        expected=f"word of the job's first node within {MEETING_SECONDS} s",
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
        with durable_file(folder / f"{node.name}.json") as file:
            file.write(json.dumps({"status": status, "why": why, "at": time.time()}).encode())
