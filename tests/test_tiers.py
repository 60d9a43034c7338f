"""Each test belongs to one tier, and a tier that takes too long is told, and fails where that is no accident."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiers import CI_FACTOR, TESTS, TIERS, belongs, verdict


def test_each_folder_is_of_one_tier() -> None:
    names = [path.name for path in TESTS.iterdir()]
    assert {name for tier in TIERS.values() for name in tier.folders} < set(names), "folders that are there"
    for name in names:
        assert sum(belongs(name, tier) for tier in TIERS) == 1, name
    assert belongs("objectives", "test")
    assert belongs("test_readme.py", "test")
    assert belongs("slurm", "test-cluster")
    assert not belongs("slurm", "test")


def test_a_tier_over_its_budget_is_told_and_fails_in_ci_when_far_over() -> None:
    budget = 60 * TIERS["test"].minutes
    assert verdict(budget, "test", ci=True) == (False, "make test: 600 s of the 600 s that it may take")
    for factor, ci, fails in ((CI_FACTOR * 0.99, True, False), (CI_FACTOR * 1.01, False, False), (1.6, True, True)):
        found, line = verdict(factor * budget, "test", ci=ci)
        assert found == fails
        assert line.startswith("OVER BUDGET: ")
        assert ("this fails" in line) == fails


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """With a test in each of some folders, of which the tier `test` may take no time at all."""
    tests, text = tmp_path / "tests", (TESTS / "tiers.py").read_text()
    for folder in ("", "objectives", "slurm", "browser", "drills"):
        (tests / folder).mkdir()
        (tests / folder / "__init__.py").touch()
        one = "import subprocess\n\ndef test_one():\n    subprocess.run(['true'], check=True)\n"
        (tests / folder / f"test_in_{folder or 'tests'}.py").write_text(one)
    assert '"test": Tier(10)' in text
    (tests / "tiers.py").write_text(text.replace('"test": Tier(10)', '"test": Tier(0)'))
    (tests / "conftest.py").write_text('pytest_plugins = ["tests.tiers"]\n')
    return tmp_path


def run(checkout: Path, *words: str, ci: bool) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-v", *words]
    environment = {"PATH": os.environ["PATH"], **({"CI": "1"} if ci else {})}
    return subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=200)


@pytest.mark.parametrize(
    ("words", "collected"),
    [
        (("--tier", "test", "tests"), "objectives tests"),
        (("--tier", "test", "tests/objectives", "tests/slurm"), "objectives"),
        (("--tier", "test-cluster", "tests"), "browser slurm"),
        (("tests/browser", "tests/drills"), "browser drills"),
    ],
)
def test_a_tier_collects_its_own_tests(checkout: Path, words: tuple[str, ...], collected: str) -> None:
    done = run(checkout, *words, ci=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " ".join(sorted(re.findall(r"test_in_(\w+)\.py::test_one PASSED", done.stdout))) == collected
    assert ("processes started" in done.stdout) == ("--tier" in words)


def test_a_budget_that_is_far_exceeded_fails_a_session_in_ci(checkout: Path) -> None:
    for part, ci, status in (("tests", True, 1), ("tests", False, 0), ("tests/objectives", True, 0)):
        done = run(checkout, "--tier", "test", "-n", "2", part, ci=ci)
        assert done.returncode == status, done.stdout + done.stderr
        assert ("OVER BUDGET" in done.stdout) == (part == "tests"), done.stdout
        number = 2 if part == "tests" else 1
        assert f"{number} tests, {number} processes started by them" in done.stdout, done.stdout
