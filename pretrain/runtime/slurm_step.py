"""Tasks of srun as ranks: `srun -n8 python -m pretrain RECIPE` without a launcher of ours in between.

SLURM tells each task its number, how many there are and where they run; here that becomes the variables of torchrun,
which all else reads. Loads no torch.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping

_FIRST_PORT, _NUM_PORTS = 28_000, 4_768  # below those that the kernel gives to whoever asks for any


def is_task_of_several(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether srun started this process as one of several tasks, and nobody said since which rank it is.

    A batch script has SLURM_NTASKS too, but is no task: only what srun starts knows the tasks of its step.
    """
    several = int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1
    return several and "SLURM_PROCID" in environment and "RANK" not in environment


def join_step() -> None:
    """Sets the variables of torchrun where this process is one of several tasks of srun; else does nothing."""
    if is_task_of_several():
        os.environ.update(rank_variables(os.environ))


def rank_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns the variables of torchrun for a task of srun.

    An address or a port for the rendezvous that is set already is kept; else it is that of the step's first node, and
    a port that follows from the numbers of job and step, so that all tasks find the same.
    """
    port = _FIRST_PORT + (31 * int(environment["SLURM_JOB_ID"]) + int(environment["SLURM_STEP_ID"])) % _NUM_PORTS
    per_node = _tasks_per_node(environment["SLURM_STEP_TASKS_PER_NODE"])
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(per_node[int(environment["SLURM_NODEID"])]),
        "MASTER_ADDR": environment.get("MASTER_ADDR") or _address(environment, len(per_node)),
        "MASTER_PORT": environment.get("MASTER_PORT") or str(port),
    }


def has_own_gpu(rank: int, world_size: int, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a rank is a task of srun, which may bind a GPU to each task; ranks of our own jobs, which an agent
    starts, are not.
    """
    task = (environment.get("SLURM_PROCID"), environment.get("SLURM_STEP_NUM_TASKS"))
    return world_size > 1 and task == (str(rank), str(world_size))


def _tasks_per_node(text: str) -> list[int]:
    """Returns the number of tasks on each node of a step from SLURM's short form: `2(x3),1` is 2, 2, 2, 1."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(count) for count, times in found for _ in range(int(times or 1))]


def _address(environment: Mapping[str, str], num_nodes: int) -> str:
    """Returns the address of the step's first node, under which SLURM itself finds it."""
    if num_nodes == 1:
        return "127.0.0.1"
    name = first_host(environment["SLURM_STEP_NODELIST"])
    words = ["scontrol", "show", "node", "-o", name]
    try:
        said = subprocess.run(words, capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        return name
    match = re.search(r"\bNodeAddr=(\S+)", said)
    return match[1] if match else name


def first_host(nodes: str) -> str:
    """Returns the first of the hosts in SLURM's short form: `gpu[07-09,12]-ib,other` begins with gpu07-ib."""
    match = re.match(r"([^\[,]*)(?:\[(\w+)[^\]]*\]([^,\[]*))?", nodes)
    assert match is not None
    return "".join(part or "" for part in match.groups())
