"""Whole runs as torchrun and `pretrain train` start them, and what a rank says of wrong input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import begun, pretrain, program
from tests.runs import losses, train, write_recipe
from tests.shards import write_shards

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("data") / "train")


@pytest.fixture
def recipe(shards: Path, tmp_path: Path) -> Path:
    """MAE, 100 samples in batches of 8: an epoch is 12.5 steps, so that nothing falls together with its end."""
    return write_recipe(tmp_path / "recipe.yaml", shards)


def test_torchrun_starts_the_same_run(recipe: Path, tmp_path: Path) -> None:
    """In processes of their own, all of them."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    (tmp_path / "pretrain.py").write_text("raise SystemExit(0)")  # which is not ours, nor found
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        [*torchrun, "python", "-P", "-m", "pretrain", str(recipe), "--out", str(tmp_path / "a"), "--max-steps", "2"],
        capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PATH": path}, timeout=300,
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    train(recipe, tmp_path / "b", 2, max_steps=2)
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


def test_overfit_batch_learns_one_batch_and_leaves_the_run_alone(recipe: Path, tmp_path: Path) -> None:
    done = pretrain("train", recipe, "--out", tmp_path / "run", "--overfit-batch", "--set", "schedule.steps=60")
    assert f"and {tmp_path / 'run-overfit'}, building" in done.stderr
    found = losses(tmp_path / "run-overfit")
    assert found[60] < 0.8 * found[1]
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "run-overfit" / "checkpoints").exists()


def test_a_budget_of_skipped_steps_names_the_samples(shards: Path, tmp_path: Path) -> None:
    recipe = write_recipe(
        tmp_path / "r.yaml", shards,
        optim={"base_lr": 1e30, "lr_batch": None},
        runtime={"peak_tflops": 0.1, "threads": 1, "max_skipped_steps": 2},
    )  # fmt: skip
    failed = pretrain("train", recipe, "--nproc", 2, "--out", tmp_path / "run", status=1)
    assert "expected at most 2 steps without a finite" in failed.stderr
    assert "0000" in failed.stderr
    assert "skipped" in failed.stdout
    (line, *_) = (line for line in failed.stderr.splitlines() if "expected at most 2 steps" in line)
    words = line.partition("error: ")[2]
    assert words in (tmp_path / "run" / "log-rank0.txt").read_text()
    (shown,) = json.loads(pretrain("status", tmp_path / "run", "--json").stdout)
    assert (shown["state"], shown["error"]) == ("failed", words)


def rank_says(*arguments: object) -> tuple[int, str]:
    """Exit status and stderr of `python -m pretrain ARGUMENTS`."""
    with begun(program("pretrain", *arguments)) as command:
        done = command.wait()
    return done.status, done.stderr


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


class TestWrongInput:
    """What a rank says of it: exit status 2, one message that says what to do, and nothing changed on disk.

    More of it, as `pretrain train` says it before there is a rank: tests/launch/test_cli.py.
    """

    def refused(self, folder: Path, *arguments: object) -> str:
        before = snapshot(folder)
        status, message = rank_says(*arguments, "--out", folder / "run")
        assert status == 2, message
        assert snapshot(folder) == before
        assert "Traceback" not in message
        assert message.count("error:") == 1
        return message

    def test_labels_missing(self, recipe: Path, tmp_path: Path) -> None:
        bare = write_shards(tmp_path / "bare", 10, label=False)
        supervised = "objective={kind: supervised, num_classes: 2}"
        assert "cls" in self.refused(tmp_path, recipe, "--set", f"data.train={bare}", "--set", supervised)

    def test_folder_of_another_run(self, recipe: Path, tmp_path: Path) -> None:
        train(recipe, tmp_path / "run", max_steps=1)
        message = self.refused(tmp_path, recipe, "--set", "optim.base_lr=0.5")
        assert "optim.base_lr" in message
        other = write_shards(tmp_path / "other", 101)
        assert "data.train" in self.refused(tmp_path, recipe, "--set", f"data.train={other}")

    def test_pipe_url(self, recipe: Path, tmp_path: Path) -> None:
        message = self.refused(tmp_path, recipe, "--set", f"data.train='pipe:touch {tmp_path}/owned'")
        assert "pipe" in message
        assert not (tmp_path / "owned").exists()
