"""One cluster for each file of tests, and one uninterrupted run to compare with."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.runs import losses, train
from tests.slurm.cluster import SlurmCluster, slurm_cluster, why_not
from tests.slurm.jobs import Place, write_slurm_recipe


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    if (reason := why_not()) is not None:
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    with slurm_cluster() as up:
        yield up


@pytest.fixture(scope="module")
def place(cluster: SlurmCluster, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A folder with a recipe and its data, from which runs are submitted."""
    folder = tmp_path_factory.mktemp("slurm")
    write_slurm_recipe(folder)
    return Place(cluster, folder)


@pytest.fixture(scope="module")
def expected(place: Place) -> dict[int, float]:
    """Losses by step of the same recipe on two ranks, without SLURM and without a stop."""
    train(place.folder / "recipe.yaml", place.folder / "whole", 2)
    return losses(place.folder / "whole")
