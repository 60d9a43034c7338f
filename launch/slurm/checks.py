"""Checks whether SLURM's commands are here and answer, and whether it has what a cluster file asks for."""

from __future__ import annotations

import getpass
import shutil
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipeline.errors import PretrainError
from launch.slurm.commands import parse_minutes, partitions, slurm
from launch.slurm.finding import Finding, error, from_error, ok, warning

if TYPE_CHECKING:
    from launch.slurm.cluster import Cluster

_NEEDED = ("sbatch", "squeue", "scontrol")
_KEYS = {
    "account": "account", "qos": "qos", "gres": "gpus_per_node", "memory": "memory_gb", "feature": "sbatch.constraint",
    "time limit": "time_minutes", "partition": "partition", "node": "nodes",
}  # fmt: skip
_FOR_GOOD = ("nvalid", "can not be satisfied")
_USEFUL = {"sacct": "how jobs ended that left the queue", "sacctmgr": "accounts and qos before a job is submitted"}


def check_slurm(cluster: Cluster | None) -> Iterator[Finding]:
    """Checks all that a cluster file asks for; without one, whether SLURM is here and answers."""
    missing = [name for name in _NEEDED if shutil.which(name) is None]
    trouble = error if cluster is not None else warning
    if len(missing) == len(_NEEDED) and cluster is None:
        yield ok("SLURM", "not here: runs start on this machine")
        return
    if missing:
        fix = "Run this where jobs are submitted, or install slurm-client."
        yield trouble("SLURM", f"no {', '.join(missing)} on PATH", fix)
        return
    said, problem = _ask("scontrol", "ping")
    if problem:
        fix = "See that slurm.conf is the cluster's, that munge runs, and that slurmctld is up."
        yield trouble("SLURM", f"scontrol ping: {problem}", fix)
        return
    yield ok("SLURM", said[0] if said else "answers")
    yield from _accounting()
    if cluster is not None:
        yield from _partition(cluster)
        yield from _account(cluster)


def check_folder_name(folder: Path) -> Iterator[Finding]:
    """Checks that SLURM takes a job's folder as it is written: in the names of logs it replaces some characters."""
    if found := sorted(set(str(folder.absolute())) & set("%\\\n")):
        shown = ", ".join(repr(character) for character in found)
        yield error("run folder", f"{folder.absolute()} has {shown} in its path, which SLURM reads as a pattern",
                    "Choose another folder with --out.")  # fmt: skip


def check_script(script: str) -> Iterator[Finding]:
    """Asks SLURM itself whether it would take a batch script, and reports what it calls invalid; nothing is queued."""
    try:
        slurm("sbatch", "--test-only", seconds=20, given=script)
    except PretrainError as raised:
        said = raised.found.splitlines()[-1] if raised.found else ""
        if any(word in said for word in _FOR_GOOD):  # other words may be of a busy hour
            field = next((field for word, field in _KEYS.items() if word in said.lower()), "sbatch")
            yield error(field, said.removeprefix("allocation failure: "), f"Correct {field} in the cluster file.")


def _accounting() -> Iterator[Finding]:
    for name, use in _USEFUL.items():
        if shutil.which(name) is None:
            yield warning(name, f"not on PATH: it tells {use}", "Install slurm-client's.")
    _, problem = _ask("sacct", "--noheader", "--starttime=now", "--format=JobID")
    if problem and shutil.which("sacct") is not None:
        what = f"does not answer ({problem}): it tells {_USEFUL['sacct']}"
        yield warning("sacct", what, "Runs go on without; ask the cluster's people for slurmdbd.")


def _partition(cluster: Cluster) -> Iterator[Finding]:
    try:
        known = partitions()
    except PretrainError as raised:
        yield from_error("partition", raised)
        return
    if cluster.partition is None:
        default = [name for name, found in known.items() if found.get("Default") == "YES"]
        if not default:
            fix = f"Name one in the cluster file: {', '.join(known)}."
            yield error("partition", "none named, and the cluster has no default", fix)
            return
        names = default[:1]
    else:
        names = cluster.partition.split(",")
    for name in names:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            fix = f"{f'Did you mean {near[0]}? ' if near else ''}It has: {', '.join(known) or 'none'}."
            yield error("partition", f"expected one of the cluster's, found {name}", fix)
            return
    # Of several the job takes whichever can start it first: one that can is enough.
    found = [_one_partition(cluster, name, known[name]) for name in names]
    yield from next((one for one in found if all(finding.level != "error" for finding in one)), found[0])


def _one_partition(cluster: Cluster, name: str, partition: Mapping[str, str]) -> list[Finding]:
    problems, nodes = list(_misfits(cluster, name, partition)), _nodes(cluster, name)
    fits = [] if problems else [ok("partition", f"{name}, jobs up to {partition.get('MaxTime', 'UNLIMITED')}")]
    return [*problems, *([nodes] if nodes is not None else []), *fits]


def _misfits(cluster: Cluster, name: str, partition: Mapping[str, str]) -> Iterator[Finding]:
    state = partition.get("State", "UP")
    if state != "UP":
        yield error("partition", f"{name} is {state}", "Take another, or wait until it is up.")
    limit = parse_minutes(partition.get("MaxTime", "UNLIMITED"))
    if limit is not None and cluster.time_minutes > limit:
        fix = f"Set time_minutes to {limit:g} or less: the run is requeued, and goes on."
        yield error("time_minutes", f"{cluster.time_minutes} minutes, and {name} gives {limit:g} at most", fix)
    most = partition.get("MaxNodes", "UNLIMITED")
    if most.isdecimal() and cluster.nodes > int(most):
        yield error("nodes", f"{cluster.nodes}, and {name} gives a job {most} at most", "Ask for fewer.")
    allowances = (("account", cluster.account, "AllowAccounts"), ("qos", cluster.qos, "AllowQos"))
    for word, value, key in allowances:
        allowed = partition.get(key, "ALL")
        taken = value or _default(key) if allowed != "ALL" else None
        if taken is not None and taken not in allowed.split(","):
            what = value or f"none, which is {taken} here"
            yield error(word, f"{what}, and {name} takes {allowed}", f"Set {word} to one of them.")


def _default(key: str) -> str | None:
    """Returns what SLURM takes for this user where nothing is given; None: it does not say."""
    user = getpass.getuser()
    asked = {
        "AllowAccounts": ("user", user, "format=DefaultAccount"),
        "AllowQos": ("associations", f"user={user}", "format=DefaultQOS"),
    }
    said, _ = _ask("sacctmgr", "--noheader", "--parsable2", "show", *asked[key])
    return next((line for line in said if line), None)


def _nodes(cluster: Cluster, name: str) -> Finding | None:
    """Checks whether enough nodes of the partition are as large as the file asks; None: SLURM lists none."""
    said, problem = _ask("sinfo", "--noheader", "--exact", f"--partition={name}", "--format=%D %c %m %G")
    if problem:
        return warning("nodes", f"sinfo could not be asked: {problem}", "sbatch itself will say if they are too few.")
    if not said:
        return None
    cpus, memory_mb = cluster.ranks_per_node * cluster.cpus_per_rank, (cluster.memory_gb or 0) * 1024
    enough = 0
    for line in said:
        count, *has = line.split(maxsplit=3)
        fits = (
            int(has[0].rstrip("+")) >= cpus
            and int(has[1].rstrip("+")) >= memory_mb
            and _gpus(has[2], cluster.gpu_type) >= cluster.gpus_per_node
        )
        enough += int(count) if fits else 0
    wanted = f"{cpus} CPUs, {cluster.gpus or 0} GPUs and {cluster.memory_gb or 0:g} GB"
    if enough < cluster.nodes:
        fix = "Ask for less, or for another partition: `sinfo --Node --long` shows them."
        return error("nodes", f"{enough} of {name} have {wanted}, expected {cluster.nodes}", fix)
    return ok("nodes", f"{enough} of {name} have {wanted}")


def _account(cluster: Cluster) -> Iterator[Finding]:
    if cluster.account is None and cluster.qos is None:
        return
    form = ("--noheader", "--parsable2", "show", "associations", f"user={getpass.getuser()}", "format=Account,QOS")
    said, problem = _ask("sacctmgr", *form)
    rows = [line.split("|") for line in said if "|" in line]
    if problem or not rows:
        why = problem or "it knows no account of this user"
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


def _ask(*words: str) -> tuple[list[str], str]:
    """Returns the lines of SLURM's answer, and the reason where there is none, which is empty otherwise."""
    try:
        text = slurm(*words, seconds=10)
    except PretrainError as raised:
        return [], raised.found.splitlines()[-1].rstrip(".") if raised.found else "no reason given"
    return [line.strip() for line in text.splitlines() if line.strip()], ""


def _gpus(resources: str, wanted: str | None) -> int:
    """Counts the GPUs of a type, or all, among a node's generic resources: `gpu:8`, `gpu:a100:4(S:0-1)`, `(null)`."""
    total = 0
    for one in resources.split(","):
        kind, *rest = one.partition("(")[0].split(":")
        if kind == "gpu" and rest and rest[-1].isdecimal() and wanted in (None, rest[0]):
            total += int(rest[-1])
    return total
