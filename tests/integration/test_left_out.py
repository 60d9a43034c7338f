"""A run whose validation set, or a set of whose `evals`, has images that cannot be used: left out, named, counted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.commands import pretrain
from tests.runs import logged, train, write_recipe
from tests.shards import write_images, write_shards


def spoiled(folder: Path, num_samples: int, numbers: tuple[int, ...]) -> Path:
    """An image folder as `data convert` would not write it: some of its images are cut."""
    write_images(folder, num_samples)
    for i, path in enumerate(sorted(folder.rglob("*.jpg"))):
        if i in numbers:
            path.write_bytes(path.read_bytes()[:150])
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("data") / "train", 48)


@pytest.mark.slow
def test_a_run_goes_on_with_equal_numbers_at_any_world_size(shards: Path, tmp_path: Path) -> None:
    val, test = spoiled(tmp_path / "val", 20, (3, 17)), spoiled(tmp_path / "test", 20, (5,))
    whole = tmp_path / "whole"
    shutil.copytree(val, whole)
    for path in sorted(whole.rglob("*.jpg")):
        if path.stat().st_size == 150:
            path.unlink()
    evals = [{"kind": "knn", "train": str(shards), "test": str(test), "k": 3, "every_epochs": 1}]
    found = {}
    for name, folder, nproc in (("one", val, 1), ("two", val, 2), ("whole", whole, 1)):
        data = {"train": str(shards), "val": str(folder), "read_streams": 3, "shuffle_window": 16}
        recipe = write_recipe(
            tmp_path / f"{name}.yaml", shards, data=data, evals=evals, schedule={"steps": 6, "warmup": 0.1},
            validation={"every_epochs": 1},
        )  # fmt: skip
        said = train(recipe, tmp_path / name, nproc)
        (found[name],) = logged(tmp_path / name, "val/loss").values()
        lines = [line for line in said.splitlines() if "leaves" in line]
        assert len(lines) == (0 if name == "whole" else 2)
        assert all("of data.val out" in line and ".jpg" in line for line in lines)
        assert "knn: 1 of 20 test samples are left out" in said
    assert found["one"]["val/loss"] == pytest.approx(found["two"]["val/loss"], rel=1e-5)
    assert found["one"]["val/loss"] == pytest.approx(found["whole"]["val/loss"], rel=1e-6)
    for name in ("one", "two"):
        (counted,) = logged(tmp_path / name, "val/left_out").values()
        assert counted == {"val/left_out": 2}
        (report,) = (tmp_path / name / "evals").glob("*.json")
        assert json.loads(report.read_text())["data"]["left_out"] == {"test": 1}


@pytest.mark.slow
def test_more_than_the_budget_ends_the_run(shards: Path, tmp_path: Path) -> None:
    val = spoiled(tmp_path / "val", 20, (3, 17))
    data = {"train": str(shards), "val": str(val), "max_bad_samples": 1, "read_streams": 3, "shuffle_window": 16}
    recipe = write_recipe(tmp_path / "r.yaml", shards, data=data, schedule={"steps": 6, "warmup": 0.1})
    failed = pretrain("train", recipe, "--out", tmp_path / "run", status=1)
    assert "data.val: expected at most 1 samples" in failed.stderr
    assert "leaves" in (tmp_path / "run" / "log-rank0.txt").read_text()
