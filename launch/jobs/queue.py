"""Planned jobs are queued: all of them or none, and whatever kills a submission in between is mended by the next one.

Each job is queued held, its number is made durable in its folder, and only then may it start. A submission that was
killed so leaves jobs that never run, and the next one of the same folder takes them out of the queue.
"""

from __future__ import annotations

import fcntl
import json
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_pipeline.errors import InputError, PretrainError, RunError
from launch.jobs.batch import local_executor, slurm_executor
from launch.jobs.folder import JobFolder
from launch.jobs.job import SubmittedJob
from launch.slurm.cluster import Cluster
from launch.slurm.commands import AT_WORK, WAITING, from_outside, job_fields, slurm
from pretrain.recipe.strict_yaml import write_yaml
from pretrain.runtime.versions import installed

LOCK = ".submit.lock"
_HELD = "JobHeldUser"


@dataclass(frozen=True)
class PlannedJob:
    """A job that is to be queued.

    Attributes:
        folder: that of the run, or of the command.
        name: of the job, for SLURM's lists.
        cluster: what the job is given.
        record: what `job/submitted.json` is to say beside what every job has there; `words` are those of a command.
        recipe: the recipe of a run, in YAML.
        after: folders of planned jobs that must have ended well before this one starts.
        kind: what submitit calls on each node.
    """

    folder: Path
    name: str
    cluster: Cluster
    record: Mapping[str, Any] = field(default_factory=dict)
    recipe: str | None = None
    after: tuple[Path, ...] = ()
    kind: type[SubmittedJob] = SubmittedJob


@contextmanager
def only_submission(out: Path) -> Iterator[None]:
    """Lets one process at a time submit jobs of a folder, which is there.

    Raises:
        InputError: another process submits jobs of it just now.
    """
    with (out / LOCK).open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                where=str(out), expected="one submission at a time", found="another that is at work",
                fix=f"Wait for it, then see `pretrain status {out}`.",
            ) from None  # fmt: skip
        yield


def queue_jobs(
    jobs: Sequence[PlannedJob],
    code: Path,
    *,
    local: bool = False,
    tell: Callable[[PlannedJob, str], None] = lambda job, job_id: None,
) -> None:
    """Queues all jobs, or none of them: the last part of `submit_jobs`, for code that was copied before."""
    queued: dict[Path, str] = {}
    records: dict[Path, dict[str, Any]] = {}
    try:
        for job in jobs:
            records[job.folder] = record = _begin(job, code, [queued[folder] for folder in job.after], local)
            queued[job.folder] = record["job_id"] = _queue(job, code, record)
            _write(job.folder, record)
        if not local:
            slurm("scontrol", "release", ",".join(queued.values()))
    except BaseException:  # such as a full disk, or Ctrl-C
        if queued and not local:
            with suppress(PretrainError):  # held jobs never run; the next submission takes them out of the queue
                slurm("scancel", *queued.values())
        raise
    for job in jobs:
        _write(job.folder, {**records[job.folder], "released": True})
        tell(job, queued[job.folder])


def _begin(planned: PlannedJob, code: Path, after: Sequence[str], local: bool) -> dict[str, Any]:
    """Writes what the job finds in its folder; returns what is recorded of it."""
    folder, cluster = JobFolder(planned.folder), planned.cluster
    record = {
        **planned.record, "executor": "local" if local else "slurm", "job_id": None, "submitted_at": time.time(),
        "nodes": cluster.nodes, "ranks_per_node": cluster.ranks_per_node, "after": list(after), "code": str(code),
        "token": secrets.token_hex(8), "released": local,
    }  # fmt: skip
    if planned.recipe is not None:
        folder.write("recipe.yaml", planned.recipe)
    folder.write("cluster.yaml", write_yaml(cluster.model_dump(mode="json")))
    folder.write("packages.json", json.dumps(installed(), indent=1))
    folder.canceled.unlink(missing_ok=True)
    _write(planned.folder, record)
    return record


def _write(folder: Path, record: Mapping[str, Any]) -> None:
    JobFolder(folder).write("submitted.json", json.dumps(record, indent=1))


def _queue(planned: PlannedJob, code: Path, record: Mapping[str, Any]) -> str:
    """Queues a job, held where it is SLURM's. Returns its id, or raises RunError where SLURM refuses."""
    try:
        if record["executor"] == "local":
            executor = local_executor(planned.folder, planned.cluster, code)
        else:
            after = planned.kind.after_module
            executor = slurm_executor(planned.folder, planned.name, planned.cluster, code, record["after"], after)
        with from_outside():
            return str(executor.submit(planned.kind(str(planned.folder), record["token"])).job_id)
    except Exception as error:  # submitit's own, and what sbatch says
        text = str(getattr(error, "stderr", "") or error).strip()
        raise RunError("sbatch", "SLURM to take the job", text, "Correct the cluster file.") from None


def refuse_running(run: Path) -> None:
    """Checks that no job is at work in a folder: there is one at a time. What a submission that was killed left held in
    the queue is taken out of it.

    Raises:
        InputError: a job of it waits or runs.
    """
    try:
        submitted = JobFolder(run).submitted()
    except InputError:
        return
    if submitted["executor"] != "slurm":
        return
    job_id = submitted["job_id"]
    if not submitted.get("released", job_id is not None):
        for left in _held_jobs(run):
            slurm("scancel", left)
            print(f"job {left}, which a submission that was interrupted left held, is taken out of the queue")
    fields = job_fields(job_id) if job_id is not None else None
    if fields is not None and fields.get("JobState") in (*WAITING, *AT_WORK):
        raise InputError(
            where=str(run), expected="a run without a job", found=f"job {job_id}, {fields['JobState'].lower()}",
            fix=f"Follow it with `pretrain status {run}`, end it with `pretrain cancel`, or choose another --out.",
        )  # fmt: skip


def _held_jobs(run: Path) -> list[str]:
    """Returns the jobs that are held in the queue and would write their logs into the folder."""
    logs = re.escape(str(JobFolder(run).logs))
    lines = slurm("scontrol", "show", "job", "-o").splitlines()
    held = [line for line in lines if " JobState=PENDING " in line and f" Reason={_HELD} " in line]
    found = [re.match(r"JobId=(\d+) ", line) for line in held if re.search(rf" StdOut={logs}/", line)]
    return [match[1] for match in found if match is not None]
