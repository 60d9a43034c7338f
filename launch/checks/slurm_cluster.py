"""SLURM: whether its commands are here and answer, and whether it has what a cluster file asks for."""

from __future__ import annotations

import getpass
import shutil
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Protocol

from launch.checks.finding import Finding, error, ok, warning
from launch.slurm import Answer, ask

_NEEDED = ("sbatch", "squeue", "scontrol")
_USEFUL = {"sacct": "how jobs ended that left the queue", "sacctmgr": "accounts and qos before a job is submitted"}


class Cluster(Protocol):
    """Of a cluster file, what is looked at here; None: left to the cluster's own choice."""

    @property
    def partition(self) -> str | None: ...
    @property
    def account(self) -> str | None: ...
    @property
    def qos(self) -> str | None: ...
    @property
    def nodes(self) -> int: ...
    @property
    def ranks_per_node(self) -> int: ...
    @property
    def gpus_per_node(self) -> int | None: ...
    @property
    def cpus_per_rank(self) -> int | None: ...
    @property
    def memory_gb(self) -> float | None: ...
    @property
    def time_minutes(self) -> int | None: ...


def slurm(cluster: Cluster | None) -> Iterator[Finding]:
    """All of it; without a cluster file, whether SLURM is here and answers."""
    missing = [name for name in _NEEDED if shutil.which(name) is None]
    trouble = error if cluster is not None else warning
    if len(missing) == len(_NEEDED) and cluster is None:
        yield ok("SLURM", "not here: runs start on this machine")
        return
    if missing:
        fix = "Run this where jobs are submitted, or install slurm-client."
        yield trouble("SLURM", f"no {', '.join(missing)} on PATH", fix)
        return
    ping = ask("scontrol", "ping")
    if ping.problem:
        fix = "See that slurm.conf is the cluster's, that munge runs, and that slurmctld is up."
        yield trouble("SLURM", f"scontrol ping: {ping.problem}", fix)
        return
    yield ok("SLURM", ping.lines[0] if ping.lines else "answers")
    yield from _accounting()
    if cluster is not None:
        yield from _partition(cluster)
        yield from _account(cluster)


def _accounting() -> Iterator[Finding]:
    for name, use in _USEFUL.items():
        if shutil.which(name) is None:
            yield warning(name, f"not on PATH: it tells {use}", "Install slurm-client's.")
    answer = ask("sacct", "--noheader", "--starttime=now", "--format=JobID")
    if answer.problem and shutil.which("sacct") is not None:
        what = f"does not answer ({answer.problem}): it tells {_USEFUL['sacct']}"
        yield warning("sacct", what, "Runs go on without; ask the cluster's people for slurmdbd.")


def _partition(cluster: Cluster) -> Iterator[Finding]:
    answer = ask("scontrol", "--oneliner", "show", "partition")
    if answer.problem:
        yield error("partition", f"scontrol show partition: {answer.problem}", "See that the cluster answers.")
        return
    partitions = {found["PartitionName"]: found for found in map(_words, answer.lines) if "PartitionName" in found}
    if cluster.partition is None:
        default = [name for name, found in partitions.items() if found.get("Default") == "YES"]
        if not default:
            fix = f"Name one in the cluster file: {', '.join(partitions)}."
            yield error("partition", "none named, and the cluster has no default", fix)
            return
        name = default[0]
    else:
        name = cluster.partition
    if name not in partitions:
        near = get_close_matches(name, partitions, n=1)
        fix = f"{f'Did you mean {near[0]}? ' if near else ''}It has: {', '.join(partitions) or 'none'}."
        yield error("partition", f"expected one of the cluster's, found {name}", fix)
        return
    problems = list(_misfits(cluster, name, partitions[name]))
    yield from problems
    nodes = _nodes(cluster, name)
    if nodes is not None:
        yield nodes
    if not problems:
        yield ok("partition", f"{name}, jobs up to {partitions[name].get('MaxTime', 'UNLIMITED')}")


def _misfits(cluster: Cluster, name: str, partition: Mapping[str, str]) -> Iterator[Finding]:
    state = partition.get("State", "UP")
    if state != "UP":
        yield error("partition", f"{name} is {state}", "Take another, or wait until it is up.")
    limit = minutes(partition.get("MaxTime", "UNLIMITED"))
    if limit is not None and cluster.time_minutes is not None and cluster.time_minutes > limit:
        fix = f"Set time_minutes to {limit} or less: the run is requeued, and goes on."
        yield error("time", f"{cluster.time_minutes} minutes, and {name} gives {limit} at most", fix)
    most = partition.get("MaxNodes", "UNLIMITED")
    if most.isdecimal() and cluster.nodes > int(most):
        yield error("nodes", f"{cluster.nodes}, and {name} gives a job {most} at most", "Ask for fewer.")
    for key, value in (("AllowAccounts", cluster.account), ("AllowQos", cluster.qos)):
        allowed = partition.get(key, "ALL")
        if value is not None and allowed != "ALL" and value not in allowed.split(","):
            word = key.removeprefix("Allow").lower().removesuffix("s") if key == "AllowAccounts" else "qos"
            yield error(word, f"{value}, and {name} takes {allowed}", f"Set {word} to one of them.")


def _nodes(cluster: Cluster, name: str) -> Finding | None:
    """Whether enough nodes of the partition are as large as the file asks; nothing where sinfo does not answer."""
    answer = ask("sinfo", "--noheader", "--exact", f"--partition={name}", "--format=%D %c %m %G")
    if answer.problem or not answer.lines:
        return None
    cpus = cluster.ranks_per_node * (cluster.cpus_per_rank or 1)
    memory_mb, num_gpus = (cluster.memory_gb or 0) * 1000, cluster.gpus_per_node or 0
    enough = 0
    for line in answer.lines:
        count, *has = line.split(maxsplit=3)
        fits = int(has[0].rstrip("+")) >= cpus and int(has[1].rstrip("+")) >= memory_mb and _gpus(has[2]) >= num_gpus
        enough += int(count) if fits else 0
    wanted = f"{cpus} CPUs, {memory_mb / 1000:g} GB and {num_gpus} GPUs"
    if enough < cluster.nodes:
        fix = "Ask for less, or for another partition: `sinfo --Node --long` shows them."
        return error("nodes", f"{enough} of {name} have {wanted}, expected {cluster.nodes}", fix)
    return ok("nodes", f"{enough} of {name} have {wanted}")


def _account(cluster: Cluster) -> Iterator[Finding]:
    if cluster.account is None and cluster.qos is None:
        return
    form = ("--noheader", "--parsable2", "show", "associations", f"user={getpass.getuser()}", "format=Account,QOS")
    answer: Answer = ask("sacctmgr", *form)
    rows = [line.split("|") for line in answer.lines if "|" in line]
    if answer.problem or not rows:
        why = answer.problem or "it knows no account of this user"
        yield warning("account", f"sacctmgr could not be asked: {why}", "sbatch itself will say if it is wrong.")
        return
    accounts = sorted({account for account, _ in rows})
    if cluster.account is not None and cluster.account not in accounts:
        yield error("account", f"{cluster.account}, expected one of yours", f"Set account to {' or '.join(accounts)}.")
        return
    own = [row for row in rows if cluster.account in (None, row[0])]
    qos = sorted({name for _, names in own for name in names.split(",") if name})
    if cluster.qos is not None and qos and cluster.qos not in qos:
        yield error("qos", f"{cluster.qos}, expected one of the account's", f"Set qos to {' or '.join(qos)}.")
        return
    yield ok("account", cluster.account or f"the default of {', '.join(accounts)}")


def minutes(limit: str) -> int | None:
    """Of SLURM's `DAYS-HOURS:MINUTES:SECONDS`, of which days may be missing; None where there is no limit."""
    if limit in ("UNLIMITED", "INFINITE", "NONE", "n/a"):
        return None
    days, _, clock = limit.rpartition("-")
    hours, mins, _ = (int(part) for part in clock.split(":"))
    return (int(days or 0) * 24 + hours) * 60 + mins


def _words(line: str) -> dict[str, str]:
    return dict(word.split("=", 1) for word in line.split() if "=" in word)


def _gpus(resources: str) -> int:
    """Of a node's generic resources: `gpu:8`, `gpu:a100:4(S:0-1)`, `(null)`."""
    total = 0
    for one in resources.split(","):
        kind, *rest = one.partition("(")[0].split(":")
        if kind == "gpu" and rest and rest[-1].isdecimal():
            total += int(rest[-1])
    return total
