"""The nodes of a job find each other through the run's folder, before any rank is started."""

from __future__ import annotations

import json
import os
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from data_pipeline.durable import write_text
from data_pipeline.errors import InputError, PretrainError, RunError
from launch.jobs.folder import JobFolder
from launch.jobs.node import MAX_ATTEMPTS_WITHOUT_CHECKPOINT, Node
from launch.ranks.launcher import free_port
from launch.slurm.cluster import load_cluster
from launch.slurm.commands import parse_fields, slurm


@dataclass(frozen=True)
class Rendezvous:
    """What the first node writes for the others.

    Attributes:
        address: at which rank 0 listens.
        port: on which it listens.
        attempt: number of this attempt in the run, from 0.
        done: there is nothing left to do.
    """

    address: str
    port: int
    attempt: int
    done: bool = False


def verify_shared_folder(folder: JobFolder, token: str, node: Node) -> None:
    """Checks that this node sees what was submitted: a folder of the same name on its own disk is another one.

    Raises:
        InputError: the node sees no such folder, or another one.
    """
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


def host_rendezvous(folder: JobFolder, node: Node, done: bool) -> Rendezvous:
    """Writes down, on the first node, that an attempt has begun; waits for all nodes, and tells them where to meet.

    Args:
        done: there is nothing left to do.

    Raises:
        InputError: a node does not see the folder, SLURM queued the job again too often, or nobody wants it any more.
    """
    names = _node_names(node)
    rendezvous = Rendezvous(_address(node), free_port(), folder.num_attempts(), done)
    step = folder.newest_step()
    folder.note("start", attempt=rendezvous.attempt, job_id=node.job_id, nodes=names, restart=node.restart, step=step)
    if not done:
        refuse_canceled(folder, node)
        refuse_more_requeues(folder, node)
    _wait_for_nodes(folder, node, names)
    write_text(_file(folder.run, node), json.dumps(asdict(rendezvous)))
    return rendezvous


def join_rendezvous(folder: JobFolder, node: Node) -> Rendezvous:
    """Waits, on any other node, for what the first node writes.

    Raises:
        RunError: it wrote nothing in time.
    """
    path = _file(folder.run, node)
    deadline = time.monotonic() + node.patience_seconds
    while time.monotonic() < deadline:
        try:
            return Rendezvous(**json.loads(path.read_bytes()))
        except FileNotFoundError:
            time.sleep(0.2)
    raise RunError(
        where=f"{path} on {node.name}", found="none",
        expected=f"word of the job's first node within {node.patience_seconds:g} s",
        fix="See the log for what became of it; the run's folder must be on storage that all nodes share.",
    )  # fmt: skip


def refuse_canceled(folder: JobFolder, node: Node) -> None:
    """Ends a job that starts although it was canceled: SLURM did not hear of it, or has queued the job again by itself.

    Raises:
        InputError: `pretrain cancel` was given since it was submitted.
    """
    if folder.canceled.exists():
        raise InputError(
            where=f"job {node.job_id}", expected="a job that is wanted", found="`pretrain cancel` since it was queued",
            fix="Submitted again, it goes on.",
        )  # fmt: skip


def refuse_more_requeues(folder: JobFolder, node: Node) -> None:
    """Bounds what SLURM queues again by itself, after preemptions and lost nodes, as `after_job` bounds the rest.

    Raises:
        InputError: SLURM did so too often, or without a newer checkpoint.
    """
    most, before = load_cluster(folder.cluster).max_requeues, folder.attempts_without_checkpoint(node.job_id) - 1
    if node.restart > most:
        raise InputError(
            where=f"job {node.job_id}", expected=f"at most {most} requeues (max_requeues)", found=f"{node.restart}",
            fix="Submitted again, it goes on.",
        )  # fmt: skip
    # A command has no checkpoints to count.
    if before >= MAX_ATTEMPTS_WITHOUT_CHECKPOINT and not folder.submitted().get("words"):
        raise InputError(
            where=f"job {node.job_id}", expected=f"a new checkpoint within {MAX_ATTEMPTS_WITHOUT_CHECKPOINT} attempts",
            found=f"none since step {folder.newest_step()}",
            fix="See the log for what ended them: the run may kill its node. Submitted again, it goes on.",
        )  # fmt: skip


def _wait_for_nodes(folder: JobFolder, node: Node, names: list[str]) -> None:
    """Waits for all nodes: one that does not see the folder cannot say so."""
    deadline = time.monotonic() + node.patience_seconds
    while absent := [name for name in names if not (node.folder(folder.run) / f"{name}.joined").exists()]:
        if time.monotonic() > deadline:
            raise InputError(
                where=f"{folder.run} on {', '.join(absent)}", found="none",
                expected=f"the run's folder, and word of the node within {node.patience_seconds:g} s",
                fix="Choose an --out on storage that all nodes share; see the log for what became of the node.",
            )  # fmt: skip
        time.sleep(0.2)


def _file(run: Path, node: Node) -> Path:
    # Not `.json`: those are the nodes' reports, by their names.
    return node.folder(run) / "rendezvous"


def _address(node: Node) -> str:
    """Returns the address under which SLURM itself finds this node; a name that only it knows would not do."""
    if node.count == 1:
        return "127.0.0.1"
    try:
        return parse_fields(slurm("scontrol", "show", "node", "-o", node.name))["NodeAddr"]
    except (PretrainError, KeyError):
        return socket.gethostname()


def _node_names(node: Node) -> list[str]:
    """Returns the names of all nodes of the job."""
    if node.count == 1:
        return [node.name]
    try:
        return slurm("scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]).split()
    except (PretrainError, KeyError):
        return [node.name]
