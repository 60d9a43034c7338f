"""A node of a job, as its environment describes it, and the limits within which the nodes of a job work together."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path

from launch.jobs.folder import JobFolder

RENDEZVOUS_SECONDS = 45  # in which nodes hear of each other, within the first minute: all are started at once
_LATER_RENDEZVOUS_SECONDS = 180  # of a requeued job: storage may be slow to show files, a node slow to start
# After so many attempts without a newer checkpoint, what SLURM queues again by itself is not begun.
MAX_ATTEMPTS_WITHOUT_CHECKPOINT = 3


@dataclass(frozen=True)
class Node:
    """This node among those of the job.

    Attributes:
        restart: how many times this job was queued again.
    """

    name: str
    index: int
    count: int
    job_id: str
    restart: int

    @classmethod
    def from_environment(cls) -> Node:
        """Reads what SLURM, or submitit's local executor, tells this process."""
        if "SLURM_JOB_ID" not in os.environ:
            return cls(socket.gethostname(), 0, 1, os.environ.get("SUBMITIT_LOCAL_JOB_ID", str(os.getpid())), 0)
        return cls(
            name=os.environ.get("SLURMD_NODENAME", socket.gethostname()),
            index=int(os.environ.get("SLURM_NODEID", 0)),
            count=int(os.environ.get("SLURM_JOB_NUM_NODES", 1)),
            job_id=os.environ["SLURM_JOB_ID"],
            restart=int(os.environ.get("SLURM_RESTART_COUNT", 0)),
        )

    @property
    def patience_seconds(self) -> float:
        """The seconds that this node waits for the others."""
        return _LATER_RENDEZVOUS_SECONDS if self.restart else RENDEZVOUS_SECONDS

    def folder(self, run: Path) -> Path:
        """The folder in which the nodes of this attempt leave files for each other."""
        return attempt_folder(run, self.job_id, self.restart)


def attempt_folder(run: Path, job_id: str, restart: int) -> Path:
    """The folder of an attempt inside a run's folder."""
    return JobFolder(run).path / "attempts" / f"{job_id}-{restart}"
