"""`pretrain submit`: everything that can be known beforehand is checked, the code copied, a job queued.

Imports no torch: a login node is no place for it.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_pipeline.durable import durable_file
from data_pipeline.errors import InputError, RecipeError, RunError
from data_pipeline.mixture import open_training
from data_pipeline.read import open_dataset
from launch.checks.slurm_cluster import slurm
from launch.cluster import Cluster, load_cluster
from launch.job_folder import JobFolder
from launch.slurm import AT_WORK, WAITING, job_fields
from pretrain.recipe import Recipe
from pretrain.recipe_io import dump, load_recipe
from pretrain.resolve import resolve
from pretrain.strict_yaml import write_yaml
from pretrain.versions import COPIED_COMMIT, commit, installed

PACKAGES = ("data_pipeline", "pretrain", "launch")


def submit(
    recipe_path: Path,
    cluster_path: Path,
    *,
    out: Path | None = None,
    nodes: int | None = None,
    overrides: list[str] | None = None,
    dry_run: bool = False,
    local: bool = False,
    max_steps: int | None = None,
) -> None:
    """Queues a run, or goes on with one whose job has ended; says where it is kept and how to follow it.

    Args:
        recipe_path: frozen beside the run with its overrides: later changes of the file do not reach the job.
        cluster_path: what is asked of SLURM.
        out: the run's folder, on storage that all nodes see; None: `runs/<name>`.
        nodes: another number than the cluster file's. The global batch is the recipe's in any case.
        overrides: of the recipe.
        dry_run: print the batch script; write and start nothing.
        local: run the same job here, by submitit's local executor.
        max_steps: the run stops after so many steps.

    Raises:
        InputError: of whatever is wrong; nothing was written or started.
        RunError: SLURM refused.
    """
    recipe, cluster = load_recipe(recipe_path, overrides), load_cluster(cluster_path)
    cluster = Cluster.model_validate({**cluster.model_dump(), **({"nodes": nodes} if nodes else {})})
    run = (out or Path("runs") / recipe.name).resolve()
    _check_recipe(recipe, cluster)
    _check_slurm(cluster, cluster_path, run, local, dry_run)
    code = run / "code" / _digest_of_code()
    if dry_run:
        print(_script(run, cluster, code, recipe.name))
        return
    _check_folder(run)
    _copy_code(code)
    folder = JobFolder(run)
    what: dict[str, Any] = {
        "recipe": str(recipe_path), "overrides": overrides or [], "executor": "local" if local else "slurm",
        "job_id": None, "nodes": cluster.nodes, "ranks_per_node": cluster.ranks_per_node, "submitted_at": time.time(),
        "cluster": str(cluster_path), "code": str(code), "token": secrets.token_hex(8), "max_steps": max_steps,
    }  # fmt: skip
    folder.write("recipe.yaml", dump(recipe))
    folder.write("cluster.yaml", write_yaml(cluster.model_dump(mode="json")))
    folder.write("packages.json", json.dumps(installed(), indent=1))
    folder.cancelled.unlink(missing_ok=True)
    folder.write("submitted.json", json.dumps(what, indent=1))  # a job that starts at once finds it
    job_id = _queue(run, cluster, code, recipe.name, local, what["token"])
    folder.write("submitted.json", json.dumps({**what, "job_id": job_id}, indent=1))
    print(
        f"job {job_id}: {cluster.nodes} x {cluster.ranks_per_node} ranks, at most {cluster.time_minutes} minutes a time"
    )
    print(f"run: {run}")
    shown = shlex.quote(os.path.relpath(run))
    print(f"follow it: pretrain logs {shown} --follow; pretrain status {shown}; stop it: pretrain cancel {shown}")


def _check_recipe(recipe: Recipe, cluster: Cluster) -> None:
    """That the data are there and the ranks divide the batch."""
    data, cache = recipe.data, recipe.data.cache.spec()
    resolve(recipe, cluster.world_size, open_training(data.train, cache).num_samples)
    if data.val is not None and open_dataset(data.val, cache).num_samples < cluster.world_size:
        problem = f"data.val: expected a sample for each of {cluster.world_size} processes, found fewer."
        raise RecipeError(recipe.name, [problem])


def _check_slurm(cluster: Cluster, path: Path, run: Path, local: bool, dry_run: bool) -> None:
    """What SLURM would refuse, or accept and never start; a dry run may be where there is no SLURM."""
    if local:
        if cluster.nodes > 1:
            raise RecipeError(str(path), [f"nodes: expected 1 with --local, found {cluster.nodes}. Use --nodes 1."])
        return
    wrong = [finding for finding in slurm(cluster) if finding.level == "error"]
    absent = [finding for finding in wrong if finding.what == "SLURM"]
    if absent and dry_run:
        print(f"not checked with SLURM: {absent[0].found}", file=sys.stderr)
        return
    if wrong:
        raise RecipeError(str(path), [f"{finding.what}: {finding.found}. {finding.fix}" for finding in wrong])
    _refuse_running(run)


def _refuse_running(run: Path) -> None:
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


def _check_folder(run: Path) -> None:
    """That it can be written; that other nodes see it, the job finds out in its first seconds."""
    try:
        run.mkdir(parents=True, exist_ok=True)
        with durable_file(run / ".writable"):
            pass
        (run / ".writable").unlink()
    except OSError as error:
        raise InputError(
            where=f"--out {run}", expected="a folder that can be written", found=error.strerror or str(error)
        ) from None


def _roots() -> Path:
    """Where the code that runs now lies."""
    return Path(__file__).resolve().parent.parent


def _files() -> Iterator[Path]:
    for package in PACKAGES:
        for path in sorted((_roots() / package).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                yield path


def _digest_of_code() -> str:
    digest = hashlib.sha256()
    for path in _files():
        digest.update(str(path.relative_to(_roots())).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def _copy_code(code: Path) -> None:
    """The packages, under the hash of what is in them: a job that waits keeps the code that it was submitted with."""
    if code.is_dir():
        return
    unfinished = code.with_name(f".{code.name}.{os.getpid()}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    for path in _files():
        target = unfinished / path.relative_to(_roots())
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    (unfinished / COPIED_COMMIT).write_text(commit() or "")
    os.rename(unfinished, code)


def _setup(code: Path, cluster: Cluster) -> list[str]:
    """Before the nodes' agents are started."""
    return [
        *cluster.setup,
        "export PRETRAIN_STARTED=$(date +%s.%N)",
        # The copy and nothing else: with a safe path not even a checkout that the job happens to start in.
        f"export PYTHONPATH={shlex.quote(str(code))} PYTHONSAFEPATH=1",
        "trap : TERM  # so that what comes after srun is still done",
    ]


def _queue(run: Path, cluster: Cluster, code: Path, name: str, local: bool, token: str) -> str:
    from launch.job import Job

    try:
        executor = _local(run, cluster, code) if local else _slurm(run, cluster, code, name)
        return str(executor.submit(Job(str(run), token)).job_id)
    except Exception as error:  # submitit's own, and what sbatch says
        text = str(getattr(error, "stderr", "") or error).strip()
        raise RunError("sbatch", "SLURM to take the job", text, "Correct the cluster file.") from None


def _local(run: Path, cluster: Cluster, code: Path) -> Any:
    import submitit

    executor = submitit.LocalExecutor(JobFolder(run).logs, python=cluster.python)
    executor.update_parameters(
        timeout_min=cluster.time_minutes,
        signal_delay_s=cluster.signal_lead_seconds,
        gpus_per_node=cluster.gpus_per_node,
        tasks_per_node=1,
        stderr_to_stdout=True,
        setup=_setup(code, cluster),
    )
    return executor


def _slurm(run: Path, cluster: Cluster, code: Path, name: str) -> Any:
    import submitit

    class Executor(submitit.SlurmExecutor):
        """Whose script can also be printed where there is no SLURM."""

        @classmethod
        def affinity(cls) -> int:
            return 2

    executor = Executor(JobFolder(run).logs, python=cluster.python)
    python = cluster.python or shlex.quote(sys.executable)
    given = {
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "gpus_per_node": cluster.gpus_per_node or None,
        "mem": f"{round(cluster.memory_gb * 1024)}M" if cluster.memory_gb else None,
    }
    executor.update_parameters(
        job_name=name,
        time=cluster.time_minutes,
        nodes=cluster.nodes,
        ntasks_per_node=1,
        cpus_per_task=cluster.ranks_per_node * cluster.cpus_per_rank,
        signal_delay_s=cluster.signal_lead_seconds,
        stderr_to_stdout=True,
        setup=_setup(code, cluster),
        srun_args=["--kill-on-bad-exit=1", "--export=ALL"],
        teardown=[f"{python} -u -m launch.after_job {shlex.quote(str(run))} $?"],
        additional_parameters={"requeue": True, **{k.replace("_", "-"): v for k, v in cluster.sbatch.items()}},
        **{key: value for key, value in given.items() if value is not None},
    )
    return executor


def _script(run: Path, cluster: Cluster, code: Path, name: str) -> str:
    executor = _slurm(run, cluster, code, name)
    text: str = executor._make_submission_file_text(executor._submitit_command_str, "")
    return text
