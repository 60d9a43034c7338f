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
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.datasets.mixture import open_training
from data_pipeline.datasets.read import open_dataset
from data_pipeline.durable import durable_file
from data_pipeline.errors import InputError, RecipeError, RunError
from launch.doctor.cluster import slurm, would_take
from launch.jobs.folder import JobFolder
from launch.jobs.job import Job
from launch.slurm.cluster import Cluster, load_cluster
from launch.slurm.commands import AT_WORK, WAITING, from_outside, job_fields
from pretrain.recipe.files import dump, load_recipe
from pretrain.recipe.recipe import Recipe
from pretrain.recipe.resolve import resolve
from pretrain.recipe.strict_yaml import write_yaml
from pretrain.runtime.versions import COPIED_COMMIT, commit, installed

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
    if not local:
        check_slurm(cluster, cluster_path, dry_run)
        refuse_running(run)
    elif cluster.nodes > 1:
        found = f"nodes: expected 1 with --local, found {cluster.nodes}. Use --nodes 1."
        raise RecipeError(str(cluster_path), [found])
    code = run / "code" / digest_of_code()
    if dry_run:
        print(script(run, recipe.name, cluster, code))
        return
    check_folder(run)
    copy_code(code)
    JobFolder(run).write("recipe.yaml", dump(recipe))
    what = {"recipe": str(recipe_path), "overrides": overrides or [], "cluster": str(cluster_path)}
    job_id = queue(run, recipe.name, cluster, code, {**what, "max_steps": max_steps}, local=local)
    print(
        f"job {job_id}: {cluster.nodes} x {cluster.ranks_per_node} ranks, at most {cluster.time_minutes} minutes a time"
    )
    print(f"run: {run}")
    shown = shlex.quote(os.path.relpath(run))
    print(f"follow it: pretrain logs {shown} --follow; pretrain status {shown}; stop it: pretrain cancel {shown}")


def queue(
    folder: Path,
    name: str,
    cluster: Cluster,
    code: Path,
    what: Mapping[str, Any],
    *,
    local: bool = False,
    after: Sequence[str] = (),
) -> str:
    """Queues the job of a run, or of a command, and writes down what was queued. Returns the job's id.

    Args:
        folder: the run's, with its recipe in it, or the command's.
        name: of the job, for SLURM's lists.
        cluster: what it is given.
        code: of copy_code.
        what: more to write down; `words` are those of a command.
        local: by submitit's local executor.
        after: ids of jobs that must have ended well before; where one does not, this one is dropped.

    Raises:
        RunError: SLURM refused.
    """
    job, token = JobFolder(folder), secrets.token_hex(8)
    record = {
        **what, "executor": "local" if local else "slurm", "job_id": None, "submitted_at": time.time(),
        "nodes": cluster.nodes, "ranks_per_node": cluster.ranks_per_node, "after": list(after), "code": str(code),
        "token": token,
    }  # fmt: skip
    job.write("cluster.yaml", write_yaml(cluster.model_dump(mode="json")))
    job.write("packages.json", json.dumps(installed(), indent=1))
    job.cancelled.unlink(missing_ok=True)
    job.write("submitted.json", json.dumps(record, indent=1))  # a job that starts at once finds it
    try:
        executor = _local(folder, cluster, code) if local else _slurm(folder, cluster, code, name, after)
        with from_outside():
            job_id = str(executor.submit(Job(str(folder), token)).job_id)
    except Exception as error:  # submitit's own, and what sbatch says
        text = str(getattr(error, "stderr", "") or error).strip()
        raise RunError("sbatch", "SLURM to take the job", text, "Correct the cluster file.") from None
    job.write("submitted.json", json.dumps({**record, "job_id": job_id}, indent=1))
    return job_id


def _check_recipe(recipe: Recipe, cluster: Cluster) -> None:
    """That the data are there and the ranks divide the batch."""
    data, cache = recipe.data, recipe.data.cache.spec()
    resolve(recipe, cluster.world_size, open_training(data.train, cache).num_samples)
    if data.val is not None and open_dataset(data.val, cache).num_samples < cluster.world_size:
        problem = f"data.val: expected a sample for each of {cluster.world_size} processes, found fewer."
        raise RecipeError(recipe.name, [problem])
    for path in {path for config in recipe.evals for path in config.datasets}:
        open_dataset(path, cache)


def check_slurm(cluster: Cluster, path: Path, dry_run: bool) -> None:
    """What SLURM would refuse, or accept and never start; a dry run may be where there is no SLURM.

    Raises:
        RecipeError: of the cluster file.
    """
    wrong = [finding for finding in slurm(cluster) if finding.level == "error"]
    absent = [finding for finding in wrong if finding.what == "SLURM"]
    if absent and dry_run:
        print(f"not checked with SLURM: {absent[0].found}", file=sys.stderr)
        return
    if not wrong:
        wrong = list(would_take(script(Path.cwd(), "test", cluster, Path.cwd())))
    if wrong:
        raise RecipeError(str(path), [f"{finding.what}: {finding.found}. {finding.fix}" for finding in wrong])


def refuse_running(run: Path) -> None:
    """One job at a time is at work in a folder.

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


def check_folder(run: Path) -> None:
    """That it can be written; that other nodes see it, the job finds out in its first seconds.

    Raises:
        InputError: it cannot.
    """
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
    return Path(__file__).resolve().parents[2]


def _files() -> Iterator[Path]:
    for package in PACKAGES:
        for path in sorted((_roots() / package).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                yield path


def digest_of_code() -> str:
    """Of what `copy_code` copies."""
    digest = hashlib.sha256()
    for path in _files():
        digest.update(str(path.relative_to(_roots())).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def copy_code(code: Path) -> None:
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
    """Lines of shell before the nodes' agents are started."""
    return [
        *cluster.setup,
        "export PRETRAIN_STARTED=$(date +%s.%N)",
        # The copy before all else: with a safe path even before a checkout that the job happens to start in.
        f"export PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}} PYTHONSAFEPATH=1",
    ]


def _local(folder: Path, cluster: Cluster, code: Path) -> Any:
    import submitit

    # submitit's own `setup` puts a shell above its controller, under whose number signals would then be lost.
    shell = "\n".join(["set -e", *_setup(code, cluster), f'exec {cluster.python or shlex.quote(sys.executable)} "$@"'])
    executor = submitit.LocalExecutor(JobFolder(folder).logs, python=shlex.join(["sh", "-c", shell, "sh"]))
    executor.update_parameters(
        timeout_min=cluster.time_minutes,
        signal_delay_s=cluster.signal_lead_seconds,
        gpus_per_node=cluster.gpus_per_node,
        tasks_per_node=1,
        stderr_to_stdout=True,
    )
    return executor


def _slurm(folder: Path, cluster: Cluster, code: Path, name: str, after: Sequence[str]) -> Any:
    import submitit

    class Executor(submitit.SlurmExecutor):
        """Whose script can also be printed where there is no SLURM."""

        @classmethod
        def affinity(cls) -> int:
            return 2

    executor = Executor(JobFolder(folder).logs, python=cluster.python)
    python = cluster.python or shlex.quote(sys.executable)
    given = {
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "gpus_per_node": cluster.gpus,
        "mem": f"{round(cluster.memory_gb * 1024)}M" if cluster.memory_gb else None,
    }
    own = {key.replace("_", "-"): value for key, value in cluster.sbatch.items() if value is not False}
    cpus = cluster.ranks_per_node * cluster.cpus_per_rank
    waits = {"dependency": f"afterok:{':'.join(after)}", "kill-on-invalid-dep": "yes"} if after else {}
    executor.update_parameters(
        job_name=name,
        time=cluster.time_minutes,
        nodes=cluster.nodes,
        ntasks_per_node=1,
        cpus_per_task=cpus,
        signal_delay_s=cluster.signal_lead_seconds,
        stderr_to_stdout=True,
        setup=[*_setup(code, cluster), "set +e", "trap : TERM  # so that what comes after srun is still done"],
        # From SLURM 22.05 on srun takes no number of CPUs from sbatch, and binds a task to one.
        srun_args=["--kill-on-bad-exit=1", "--export=ALL", f"--cpus-per-task={cpus}"],
        teardown=[f"{python} -u -m launch.jobs.after_job {shlex.quote(str(folder))} $?"],
        additional_parameters={"requeue": True, **own, **waits},
        **{key: value for key, value in given.items() if value is not None},
    )
    return executor


def script(folder: Path, name: str, cluster: Cluster, code: Path, after: Sequence[str] = ()) -> str:
    """What `queue` would give sbatch."""
    executor = _slurm(folder, cluster, code, name, after)
    text: str = executor._make_submission_file_text(executor._submitit_command_str, "")
    return text
