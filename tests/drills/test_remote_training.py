"""Training from s3:// and from an HTTP server in bad health, through a cache smaller than the data: the local losses,
to the bit. And from a server that is dead: an error, soon.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.data_pipeline.servers import Fault, bucket, served
from tests.runs import losses, write_recipe
from tests.shards import write_shards

FAULTS = ("500", "stall", "truncate", "page")
STEPS = 40


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve shards of twenty; the run sees each sample, and some of them twice."""
    return write_shards(tmp_path_factory.mktemp("data") / "train", 240, per_shard=20)


@pytest.fixture(scope="module")
def expected(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The losses of the local run."""
    folder = tmp_path_factory.mktemp("local")
    recipe = write_recipe(folder / "recipe.yaml", "", data=data_from(str(shards), folder, shards))
    pretrain("train", recipe, "--out", folder / "run")
    found = losses(folder / "run")
    assert sorted(found) == list(range(1, STEPS + 1))
    return found


def data_from(train: str, folder: Path, shards: Path, **cache: Any) -> dict[str, Any]:
    """A cache of just over half of the data: two streams, each in two shards with one more to come."""
    largest = max(path.stat().st_size for path in shards.glob("*.tar"))
    room = {"folder": str(folder / "cache"), "max_gb": 6.5 * largest / 1e9, "timeout_seconds": 3}
    return {"train": train, "read_streams": 2, "shuffle_window": 16, "cache": room | cache}


def pretrain(*arguments: object, status: int = 0) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", *map(str, arguments)],
        capture_output=True, text=True, env=environment, timeout=500,
    )  # fmt: skip
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def sizes(cache: Path) -> Iterator[int]:
    return (path.stat().st_size for path in cache.iterdir() if not path.name.startswith("."))


def check_bound(folder: Path, shards: Path) -> None:
    data = sum(path.stat().st_size for path in shards.glob("*.tar"))
    assert sum(sizes(folder / "cache")) < 0.6 * data


def test_from_s3(shards: Path, expected: dict[int, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with bucket(shards, monkeypatch) as url:
        recipe = write_recipe(
            tmp_path / "recipe.yaml",
            "",
            data=data_from(url, tmp_path, shards, timeout_seconds=30),
            runtime={"peak_tflops": 0.1, "threads": 1, "num_workers": 1},
        )
        pretrain("train", recipe, "--out", tmp_path / "run")
    assert losses(tmp_path / "run") == expected
    check_bound(tmp_path, shards)
    written = [path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert not [content for content in written if b"sesame" in content]


@pytest.mark.parametrize(("nproc", "num_workers"), [(1, 0), (2, 2)])
def test_from_a_server_in_bad_health(
    shards: Path,
    expected: dict[int, float],
    tmp_path: Path,
    nproc: int,
    num_workers: int,
    figure: Callable[[str], None],
) -> None:
    """One request in twenty fails, in one of four ways; another number of ranks sums the losses in another order."""
    chance = random.Random(nproc)

    def choose(number: int, name: str) -> Fault:
        return chance.choice(FAULTS) if number % 20 == 7 else None

    with served(shards, choose) as server:
        recipe = write_recipe(
            tmp_path / "recipe.yaml",
            "",
            data=data_from(server.url, tmp_path, shards),
            runtime={"peak_tflops": 0.1, "threads": 1, "num_workers": num_workers},
        )
        pretrain("train", recipe, "--nproc", nproc, "--out", tmp_path / "run")
        figure(f"{len(server.requests)} requests, faults: {[fault for fault in server.faults if fault]}")
    found = losses(tmp_path / "run")
    if nproc == 1:
        assert found == expected
    else:
        local = write_recipe(tmp_path / "local.yaml", "", data=data_from(str(shards), tmp_path, shards))
        pretrain("train", local, "--nproc", nproc, "--out", tmp_path / "local")
        assert found == losses(tmp_path / "local")
    assert any(server.faults)
    assert len([name for name in server.requests if name.endswith(".tar")]) > 12  # some came more than once
    check_bound(tmp_path, shards)


def test_a_server_that_dies_is_told_with_its_url(shards: Path, tmp_path: Path) -> None:
    """Before the run: nothing is started. In the middle of it: the run fails, once what was fetched is used up."""
    alive = [True]

    def choose(number: int, name: str) -> Fault:
        alive[0] = alive[0] and number < 12
        return None if alive[0] else "500"

    with served(shards, choose) as server:
        data = data_from(server.url, tmp_path, shards, timeout_seconds=3, retries=2)
        recipe = write_recipe(tmp_path / "recipe.yaml", "", data=data)
        said = pretrain("train", recipe, "--out", tmp_path / "run", status=1)
        assert f"{server.url}/shard-" in said
        assert "HTTP status 500 (the last of 3 attempts" in said
        assert "Traceback" not in said
        url = server.url
    said = pretrain("train", recipe, "--out", tmp_path / "other", status=1)
    assert f"{url}/manifest.json: expected the file to be sent" in said
    assert "the last of 3 attempts" in said
    assert "Traceback" not in said
    assert not (tmp_path / "other").exists()
