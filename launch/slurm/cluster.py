"""The typed description of a cluster: where and how a run is queued. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator

from pretrain.recipe.base import Group
from pretrain.recipe.typed import load_typed

# Parameters of sbatch that have a key of their own here, or that this project decides.
_OWN = {
    "partition": "partition", "account": "account", "qos": "qos", "nodes": "nodes", "time": "time_minutes",
    "gpus-per-node": "gpus_per_node", "gpus": "gpus_per_node", "cpus-per-task": "cpus_per_rank", "mem": "memory_gb",
    "signal": "signal_lead_seconds", "ntasks-per-node": "ranks_per_node", "ntasks": "ranks_per_node",
}  # fmt: skip
_DECIDED = {"requeue", "no-requeue", "output", "error", "open-mode", "array", "job-name", "dependency", "chdir", "wrap"}
_DECIDED |= {"parsable", "quiet", "wait", "test-only"}  # submitit reads what sbatch says
_DECIDED |= {"hold"}  # each job is queued held, and released


class Cluster(Group):
    """What SLURM is to give a run. One task a node is started there, which starts the node's ranks.

    `sbatch` holds further parameters by their long names (`constraint: h100`); true is a flag without a value.
    """

    partition: str | None = None  # None: the cluster's default, as for account and qos
    account: str | None = None
    qos: str | None = None
    nodes: int = Field(1, ge=1)
    ranks_per_node: int = Field(1, ge=1)  # processes: one for each GPU
    gpus_per_node: int = Field(0, ge=0)
    gpu_type: str | None = None  # such as `a100`, where a partition has several
    cpus_per_rank: int = Field(1, ge=1)
    memory_gb: float | None = Field(None, gt=0)  # of a node; None: the partition's default
    time_minutes: int = Field(60, ge=1)
    signal_lead_seconds: int = Field(120, ge=1)  # between the warning, at which the run saves and stops, and the limit
    max_requeues: int = Field(20, ge=0)
    evals_apart: bool = False  # a recipe's `evals` are small jobs of their own, and training goes on meanwhile
    setup: tuple[str, ...] = ()  # lines of shell before anything is started, such as `module load`
    python: str | None = None  # None: the interpreter that submits
    sbatch: dict[str, str | int | bool] = {}  # noqa: RUF012  (pydantic copies it)

    @model_validator(mode="after")
    def _fits(self) -> Cluster:
        if self.gpus_per_node not in (0, self.ranks_per_node):
            raise ValueError(
                f"expected gpus_per_node {self.ranks_per_node}, one for each of ranks_per_node, or 0 to train on CPUs, "
                f"found {self.gpus_per_node}."
            )
        if self.signal_lead_seconds >= 60 * self.time_minutes:
            raise ValueError(
                f"expected signal_lead_seconds below the time limit of {60 * self.time_minutes} s, "
                f"found {self.signal_lead_seconds}."
            )
        if self.gpu_type and not self.gpus_per_node:
            raise ValueError(f"expected gpus_per_node with gpu_type {self.gpu_type}, found 0.")
        for key, value in self.sbatch.items():
            name = key.replace("_", "-")
            if name == "gres" and "gpu" in [one.partition(":")[0] for one in str(value).split(",")]:
                raise ValueError(f"expected `gpus_per_node` and `gpu_type` for GPUs, found sbatch.{key} {value}.")
            if name in _OWN:
                raise ValueError(f"expected `{_OWN[name]}` for what sbatch.{key} says, found sbatch.{key}.")
            if name in _DECIDED:
                raise ValueError(f"expected no sbatch.{key}, which `pretrain submit` decides, found it.")
        return self

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def gpus(self) -> str | int | None:
        """The GPUs of a node as sbatch takes them; None: there are none."""
        return f"{self.gpu_type}:{self.gpus_per_node}" if self.gpu_type else self.gpus_per_node or None

    def one_rank(self) -> Cluster:
        """Returns what a single process needs: a rank's share of a node, of which others may have the rest."""
        memory = self.memory_gb / self.ranks_per_node if self.memory_gb else None
        asked = {"nodes": 1, "ranks_per_node": 1, "gpus_per_node": min(1, self.gpus_per_node), "memory_gb": memory}
        further = {key: value for key, value in self.sbatch.items() if key != "exclusive"}
        return Cluster.model_validate({**self.model_dump(), **asked, "sbatch": further})


def load_cluster(path: Path) -> Cluster:
    """Reads a cluster file.

    Raises:
        RecipeError: with every problem found, each naming its path, what was expected and what was found.
    """
    return load_typed(path, Cluster, shell=("setup", "sbatch"))
