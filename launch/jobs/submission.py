"""The one way in which jobs are submitted: a run, the stages of a chain, the results of a suite, evaluations.

What SLURM would refuse is found first, then the code is copied, then all jobs are queued or none: whatever goes wrong
in between takes back those that were queued.
"""

from __future__ import annotations

import json
import secrets
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_pipeline.durable import durable_file
from data_pipeline.errors import InputError, RecipeError, RunError
from launch.jobs.batch import batch_script, local_executor, slurm_executor
from launch.jobs.code_copy import code_folder, copy_code
from launch.jobs.folder import JobFolder
from launch.jobs.job import SubmittedJob
from launch.slurm.checks import check_folder_name, check_script, check_slurm
from launch.slurm.cluster import Cluster
from launch.slurm.commands import AT_WORK, WAITING, from_outside, job_fields, slurm
from pretrain.recipe.strict_yaml import write_yaml
from pretrain.runtime.versions import installed


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


def submit_jobs(
    jobs: Sequence[PlannedJob],
    cluster_path: Path,
    out: Path,
    *,
    code_in: Path | None = None,
    dry_run: bool = False,
    local: bool = False,
    prepare: Callable[[], object] = lambda: None,
    tell: Callable[[PlannedJob, str], None] = lambda job, job_id: None,
) -> None:
    """Queues all jobs, or none of them.

    Args:
        jobs: each after those that it waits for.
        cluster_path: the cluster file, for messages.
        out: the folder that is written to, on storage that all nodes see.
        code_in: the folder in which the copy of the code is kept; None: `out`.
        dry_run: print the batch scripts; write and start nothing.
        local: run the one job here, by submitit's local executor.
        prepare: called once nothing was found wrong, before the first job is queued.
        tell: called for each job that was queued, with its id.

    Raises:
        InputError: something is wrong; nothing was written or started.
        RunError: SLURM refused a job; no job is left in its queue.
    """
    for job in jobs:
        for wrong in check_folder_name(job.folder):
            raise InputError(f"--out {job.folder}", "a path that SLURM takes as it is", wrong.found, wrong.fix)
    if not local:
        for cluster in {write_yaml(job.cluster.model_dump(mode="json")): job.cluster for job in jobs}.values():
            check_cluster(cluster, cluster_path, dry_run)
        for job in jobs:
            refuse_running(job.folder)
    code = code_folder(code_in or out)
    if dry_run:
        for job in jobs:
            after = [f"<job of {name}>" for folder in job.after for name in [folder.name.removesuffix(".job")]]
            print(batch_script(job.folder, job.name, job.cluster, code, after, job.kind.after_module))
        return
    check_folder(out)
    copy_code(code)
    prepare()
    queue_jobs(jobs, code, local=local, tell=tell)


def queue_jobs(
    jobs: Sequence[PlannedJob],
    code: Path,
    *,
    local: bool = False,
    tell: Callable[[PlannedJob, str], None] = lambda job, job_id: None,
) -> None:
    """Queues all jobs, or none of them: the last part of `submit_jobs`, for code that was copied before."""
    queued: dict[Path, str] = {}
    try:
        for job in jobs:
            queued[job.folder] = _queue(job, code, [queued[folder] for folder in job.after], local)
            tell(job, queued[job.folder])
    except BaseException:  # such as a full disk, or Ctrl-C
        if queued and not local:
            slurm("scancel", *queued.values())
        raise


def _queue(planned: PlannedJob, code: Path, after: Sequence[str], local: bool) -> str:
    """Queues a job, and writes down what was queued. Returns the job's id, or raises RunError where SLURM refuses."""
    folder, cluster, token = JobFolder(planned.folder), planned.cluster, secrets.token_hex(8)
    record = {
        **planned.record, "executor": "local" if local else "slurm", "job_id": None, "submitted_at": time.time(),
        "nodes": cluster.nodes, "ranks_per_node": cluster.ranks_per_node, "after": list(after), "code": str(code),
        "token": token,
    }  # fmt: skip
    if planned.recipe is not None:
        folder.write("recipe.yaml", planned.recipe)
    folder.write("cluster.yaml", write_yaml(cluster.model_dump(mode="json")))
    folder.write("packages.json", json.dumps(installed(), indent=1))
    folder.canceled.unlink(missing_ok=True)
    folder.write("submitted.json", json.dumps(record, indent=1))  # a job that starts at once finds it
    try:
        if local:
            executor = local_executor(planned.folder, cluster, code)
        else:
            executor = slurm_executor(planned.folder, planned.name, cluster, code, after, planned.kind.after_module)
        with from_outside():
            job_id = str(executor.submit(planned.kind(str(planned.folder), token)).job_id)
    except Exception as error:  # submitit's own, and what sbatch says
        text = str(getattr(error, "stderr", "") or error).strip()
        raise RunError("sbatch", "SLURM to take the job", text, "Correct the cluster file.") from None
    folder.write("submitted.json", json.dumps({**record, "job_id": job_id}, indent=1))
    return job_id


def check_cluster(cluster: Cluster, path: Path, dry_run: bool = False) -> None:
    """Checks what SLURM would refuse, or accept and never start.

    Args:
        cluster: what a job is to be given.
        path: the cluster file, for messages.
        dry_run: there may be no SLURM here.

    Raises:
        RecipeError: something is wrong with the cluster file.
    """
    wrong = [finding for finding in check_slurm(cluster) if finding.level == "error"]
    absent = [finding for finding in wrong if finding.what == "SLURM"]
    if absent and dry_run:
        print(f"not checked with SLURM: {absent[0].found}", file=sys.stderr)
        return
    if not wrong:
        wrong = list(check_script(batch_script(Path.cwd(), "test", cluster, Path.cwd())))
    if wrong:
        raise RecipeError(str(path), [f"{finding.what}: {finding.found}. {finding.fix}" for finding in wrong])


def refuse_running(run: Path) -> None:
    """Checks that no job is at work in a folder: there is one at a time.

    Raises:
        InputError: a job of it waits or runs.
    """
    try:
        job_id = JobFolder(run).submitted()["job_id"]
    except InputError:
        return
    if JobFolder(run).submitted()["executor"] != "slurm" or job_id is None:
        return
    fields = job_fields(job_id)
    if fields is not None and fields.get("JobState") in (*WAITING, *AT_WORK):
        raise InputError(
            where=str(run), expected="a run without a job", found=f"job {job_id}, {fields['JobState'].lower()}",
            fix=f"Follow it with `pretrain status {run}`, end it with `pretrain cancel`, or choose another --out.",
        )  # fmt: skip


def check_folder(out: Path) -> None:
    """Checks that a folder can be written; that other nodes see it, the job finds out in its first seconds.

    Raises:
        InputError: it cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with durable_file(out / ".writable"):
            pass
        (out / ".writable").unlink()
    except OSError as error:
        raise InputError(
            where=f"--out {out}", expected="a folder that can be written", found=error.strerror or str(error)
        ) from None
