"""The results of a suite as jobs: what is missing is queued, what is there is not asked again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.launch.suites import tree_of, write_suite
from tests.slurm.jobs import Place

pytestmark = [pytest.mark.slow, pytest.mark.seconds(80), pytest.mark.timeout(600)]


def values(out: Path) -> dict[str, float]:
    return {
        path.relative_to(out).as_posix(): json.loads(path.read_text())["value"] for path in out.glob("*/colours/*.json")
    }


def test_what_is_missing_of_a_suite_is_made_by_jobs(place: Place) -> None:
    tree = tree_of(place.folder / "given")
    del tree["encoders"]["second"], tree["protocols"]["linear"]
    suite, out = write_suite(place.folder / "given", tree), place.folder / "suite"
    asked = ("eval", "suite", str(suite), "--out", "suite")
    queued = (*asked, "--cluster", str(place.cluster_file()))
    assert place.pretrain(*queued, "--dry-run").stdout.count("#SBATCH --nodes=1") == 2
    assert not out.exists(), "a dry run writes nothing"

    assert place.pretrain(*queued).stdout.count(": job ") == 2
    place.wait_for_all(out)
    found = values(out)
    assert set(found) == {f"{encoder}/colours/knn.json" for encoder in ("first", "random")}
    assert place.pretrain(*asked, "--dry-run").stdout.startswith("small: 2 of 2 results are there")

    (out / "random" / "colours" / "knn.json").unlink()
    assert place.pretrain(*queued).stdout.count(": job ") == 1
    place.wait_for_all(out)
    assert values(out) == found, "asked again, the same number"
    place.pretrain("report", "suite")
    assert (out / "report.html").is_file()
