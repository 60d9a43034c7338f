"""What checks find, for tests to compare; and a cluster file for them to look at."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from launch.slurm.cluster import Cluster
from launch.slurm.finding import Finding


def levels(findings: Iterable[Finding]) -> list[tuple[str, str]]:
    return [(finding.level, finding.what) for finding in findings]


def problems(findings: Iterable[Finding]) -> str:
    """What is not ok; every such line says what to do."""
    bad = [finding for finding in findings if finding.level != "ok"]
    return "\n".join(map(str, bad))


def asked(**given: Any) -> Cluster:
    """What fits the cluster of conftest.py, but for what is given."""
    fitting = {"partition": "long", "nodes": 2, "ranks_per_node": 4, "gpus_per_node": 4, "cpus_per_rank": 8,
               "memory_gb": 100.0, "time_minutes": 59}  # fmt: skip
    return Cluster(**{**fitting, **given})
