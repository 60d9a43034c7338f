"""Planned jobs are queued: all of them or none, and whatever kills a submission in between is mended by the next one.

Each job is queued held, its number is made durable in its folder, and only then is it released, which is when it may
start. A submission that is killed before leaves jobs that never run: `pretrain status` says so, and the next submission
of the same folder takes them out of the queue.
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
from launch.jobs.record import load_job
from launch.slurm.cluster import Cluster
from launch.slurm.commands import AT_WORK, HELD, WAITING, from_outside, job_fields, slurm
from pretrain.recipe.strict_yaml import write_yaml
from pretrain.runtime.versions import installed

LOCK = ".submit.lock"
_RELEASE_SECONDS = 30  # and one more for each job: a busy controller takes its time over many


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
        InputError: another process submits jobs of it just now, or the storage has no locks.
    """
    with (out / LOCK).open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                where=str(out), expected="one submission at a time", found="another that is at work",
                fix=f"Wait for it, then see `pretrain status {out}`.",
            ) from None  # fmt: skip
        except OSError as error:
            raise InputError(
                where=str(out), expected="storage on which a file can be locked", found=error.strerror or str(error),
                fix="Choose another with --out: a run there could not lock its folder either.",
            ) from None  # fmt: skip
        yield


def queue_jobs(
    jobs: Sequence[PlannedJob],
    code: Path,
    *,
    local: bool = False,
    tell: Callable[[PlannedJob, str], None] = lambda job, job_id: None,
    may_start: Callable[[], object] = lambda: None,
) -> None:
    """Queues all jobs, or none of them: the last part of `submit_jobs`, for code that was copied before.

    Args:
        may_start: called before the jobs are released. From then on they may run, whatever fails here, so that what was
            made for them has to stay.
    """
    queued: dict[Path, str] = {}
    records: dict[Path, dict[str, Any]] = {}
    try:
        for job in jobs:
            records[job.folder] = record = _begin(job, code, [queued[folder] for folder in job.after], local)
            queued[job.folder] = record["job_id"] = _queue(job, code, record)
            _write(job.folder, record)
        may_start()
        if queued and not local:
            slurm("scontrol", "release", ",".join(queued.values()), seconds=_RELEASE_SECONDS + len(queued))
    except BaseException:  # such as a full disk, or Ctrl-C
        if queued and not local:
            with suppress(PretrainError):  # held jobs never run; the next submission takes them out of the queue
                slurm("scancel", *queued.values())
        raise
    try:
        for job in jobs:
            tell(job, queued[job.folder])
    finally:  # whoever reads what is told may have gone
        for job in jobs:
            _write(job.folder, {**records[job.folder], "released": True})


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
    """Checks that no job is at work in a folder: there is one at a time.

    Raises:
        InputError: a job of it waits or runs.
    """
    job = load_job(run)
    if job is None or job.is_local or job.job_id is None:
        return
    if (state := _state(job.job_id)) in (*WAITING, *AT_WORK):
        raise InputError(
            where=str(run), expected="a run without a job", found=f"job {job.job_id}, {state.lower()}",
            fix=f"Follow it with `pretrain status {run}`, end it with `pretrain cancel`, or choose another --out.",
        )  # fmt: skip


def mend_submission(run: Path) -> None:
    """Takes a job out of the queue that a submission which was killed has left there held; one that it had released is
    left alone, and known as that. For whoever submits in its place: a job of a submission at work is held as well.
    """
    job = load_job(run)
    if job is None or job.is_local or job.released:
        return
    for left in _held_jobs(run):
        slurm("scancel", left)
        print(f"job {left}, which a submission that was interrupted left held, is taken out of the queue")
    if job.job_id is not None and _state(job.job_id) in (*WAITING, *AT_WORK):
        _write(run, {**job.submitted, "released": True})


def _state(job_id: str) -> str:
    """Returns SLURM's word for the state of a job; empty: it does not know the job."""
    return (job_fields(job_id) or {}).get("JobState", "")


def _held_jobs(run: Path) -> list[str]:
    """Returns the jobs that are held in the queue and would write their logs into the folder."""
    logs = re.escape(str(JobFolder(run).logs.absolute()))
    lines = slurm("scontrol", "show", "job", "-o").splitlines()
    held = [line for line in lines if " JobState=PENDING " in line and f" Reason={HELD} " in line]
    found = [re.match(r"JobId=(\d+) ", line) for line in held if re.search(rf" StdOut={logs}/", line)]
    return [match[1] for match in found if match is not None]
