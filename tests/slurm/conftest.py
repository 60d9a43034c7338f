"""A cluster for each worker of pytest, a folder for each test, and one uninterrupted run for all to compare with."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.runs import losses, train
from tests.slurm.cluster import SlurmCluster, slurm_cluster, why_not
from tests.slurm.jobs import Place, write_slurm_recipe


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "seconds(number): about how long it takes; of those here the longest begin first"
    )


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Longest first, so that none runs alone at the end; but each worker, which begins with two tests, gets one of the
    shortest beside its first one.
    """

    def seconds(item: pytest.Item) -> float:
        marker = item.get_closest_marker("seconds")
        return float(marker.args[0]) if marker is not None else 1.0

    items.sort(key=seconds, reverse=True)
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0))
    if workers and len(items) >= 3 * workers:
        items[workers:] = items[-workers:] + items[workers:-workers]


@pytest.fixture(scope="session")
def cluster() -> Iterator[SlurmCluster]:
    if (reason := why_not()) is not None:
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    with slurm_cluster() as up:
        yield up


@pytest.fixture
def place(cluster: SlurmCluster, tmp_path: Path) -> Iterator[Place]:
    """A folder with a recipe and its data, from which runs are submitted."""
    write_slurm_recipe(tmp_path)
    yield Place(cluster, tmp_path)
    cluster.restore()  # of what a test that failed has left


@pytest.fixture(scope="session")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Losses by step of the same recipe on two ranks, without SLURM or a stop; trained once for all workers."""
    folder = tmp_path_factory.getbasetemp()
    shared = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "reference"
    shared.mkdir(exist_ok=True)
    with (shared / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (shared / "whole").exists():
            train(write_slurm_recipe(shared), shared / "whole", 2)
    return losses(shared / "whole")
