"""The one way in which jobs are submitted: a run, the stages of a chain, the results of a suite, evaluations.

What SLURM would refuse is found first, then the code is copied, then all jobs are queued or none: whatever goes wrong
in between takes back those that were queued.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from data_pipeline.durable import durable_file
from data_pipeline.errors import InputError, RecipeError
from launch.jobs.batch import batch_script
from launch.jobs.code_copy import code_folder, copied_code
from launch.jobs.queue import PlannedJob, mend_submission, only_submission, queue_jobs, refuse_running
from launch.slurm.checks import check_folder_name, check_script, check_slurm
from launch.slurm.cluster import Cluster
from pretrain.recipe.strict_yaml import write_yaml


def submit_jobs(
    jobs: Sequence[PlannedJob],
    cluster_path: Path,
    out: Path,
    *,
    code_in: Path | None = None,
    beside: Sequence[Path] = (),
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
        beside: folders of further jobs, none of which may be at work.
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
    code = code_folder(code_in or out)
    if dry_run:
        for job in jobs:
            after = [f"<job of {name}>" for folder in job.after for name in [folder.name.removesuffix(".job")]]
            print(batch_script(job.folder, job.name, job.cluster, code, after, job.kind.after_module))
        return
    check_folder(out)
    with only_submission(out):
        for folder in [] if local else dict.fromkeys((*beside, *(job.folder for job in jobs))):
            mend_submission(folder)
            refuse_running(folder)
        with copied_code(code) as keep:
            prepare()
            queue_jobs(jobs, code, local=local, tell=tell, may_start=keep)


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


def check_folder(out: Path) -> None:
    """Checks that a folder can be written; that other nodes see it, the job finds out in its first seconds.

    Raises:
        InputError: it cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with durable_file(out / ".writable"):
            pass
        (out / ".writable").unlink(missing_ok=True)  # another may look at the same time
    except OSError as error:
        raise InputError(
            where=f"--out {out}", expected="a folder that can be written", found=error.strerror or str(error)
        ) from None
