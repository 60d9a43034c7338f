"""The executors that submitit is given for a job: a batch script for SLURM, or a process on this machine."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.jobs.folder import JobFolder
from launch.slurm.cluster import Cluster

AFTER_JOB = "launch.jobs.after_job"  # the module that the batch script of a run calls once all nodes have ended


def batch_script(
    folder: Path, name: str, cluster: Cluster, code: Path, after: Sequence[str] = (), after_module: str = AFTER_JOB
) -> str:
    """Returns the script that sbatch would be given, as of `slurm_executor`."""
    executor = slurm_executor(folder, name, cluster, code, after, after_module)
    text: str = executor._make_submission_file_text(executor._submitit_command_str, "")
    return text


def slurm_executor(
    folder: Path, name: str, cluster: Cluster, code: Path, after: Sequence[str], after_module: str = AFTER_JOB
) -> Any:
    """Returns submitit's executor for SLURM.

    Args:
        folder: that of the run, or of the command.
        name: of the job, for SLURM's lists.
        cluster: what the job is given.
        code: the copy that it runs.
        after: ids of jobs that must have ended well before; where one does not, this one is dropped.
        after_module: called once all nodes have ended, with the folder and srun's exit status.
    """
    import submitit

    class Executor(submitit.SlurmExecutor):
        """An executor whose script can also be printed where there is no SLURM."""

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
        teardown=[f"{python} -u -m {after_module} {shlex.quote(str(folder))} $?"],
        additional_parameters={"requeue": True, "hold": True, **own, **waits},  # released by launch/jobs/queue.py
        **{key: value for key, value in given.items() if value is not None},
    )
    return executor


def local_executor(folder: Path, cluster: Cluster, code: Path) -> Any:
    """Returns submitit's executor for this machine, as of `slurm_executor`."""
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


def _setup(code: Path, cluster: Cluster) -> list[str]:
    """Returns the lines of shell that come before the nodes' agents are started."""
    return [
        *cluster.setup,
        "export PRETRAIN_STARTED=$(date +%s.%N)",
        # The copy before all else: with a safe path even before a checkout that the job happens to start in.
        f"export PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}} PYTHONSAFEPATH=1",
    ]
