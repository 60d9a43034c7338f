"""Whole runs in real processes: killed, resumed, moved to other numbers of ranks; wrong input changes nothing."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, suppress
from pathlib import Path

import psutil
import pytest
import torch
import yaml

from pretrain.runtime.collectives import World
from tests.ranks import started
from tests.runs import MODEL, losses, train, write_recipe
from tests.shards import write_shards

pytestmark = pytest.mark.slow

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("data") / "train")


@pytest.fixture
def recipe(shards: Path, tmp_path: Path) -> Path:
    """MAE, 100 samples in batches of 8: an epoch is 12.5 steps, so that nothing falls together with its end."""
    return write_recipe(tmp_path / "recipe.yaml", shards)


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "launch.cli", *map(str, arguments)]


def pretrain(*arguments: object, status: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command(*arguments), capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
    assert done.returncode == status, done.stdout + done.stderr
    return done


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def ranks_of(launcher: int) -> list[psutil.Process]:
    def is_rank(child: psutil.Process) -> bool:
        with suppress(psutil.NoSuchProcess):  # its short ones may end while they are looked at
            return "launch.ranks.rank" in child.cmdline()
        return False

    return list(filter(is_rank, psutil.Process(launcher).children()))


def test_killed_in_mid_epoch_it_goes_on_to_the_bit(recipe: Path, tmp_path: Path) -> None:
    """SIGKILL of all ranks, then to the end: every loss equals the uninterrupted run's. tests/drills has more kills."""
    train(recipe, tmp_path / "whole", 2)
    expected = losses(tmp_path / "whole")
    assert sorted(expected) == list(range(1, 41))
    out = tmp_path / "killed"
    process = subprocess.Popen(
        command("train", recipe, "--nproc", 2, "--out", out),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT,
    )  # fmt: skip
    wait_for(lambda: len(ranks_of(process.pid)) == 2, process)
    ranks = ranks_of(process.pid)  # looked up before, as steps are taken meanwhile
    # Neither a checkpoint nor the end of an epoch.
    wait_for(lambda: (out / "metrics.jsonl").is_file() and max(losses(out), default=0) >= 23, process)
    for rank in ranks:
        with suppress(psutil.NoSuchProcess):  # the launcher ends the others when one has died
            rank.kill()
    process.communicate(timeout=60)
    assert process.returncode != 0
    last = pretrain("train", recipe, "--nproc", 2, "--out", out)
    assert "from scratch" not in last.stdout
    assert losses(out) == expected
    assert "finished at step 40 of 40" in train(recipe, out, 2).splitlines()[-1]
    assert losses(out) == expected


def test_goes_on_at_another_world_size_and_stage(recipe: Path, tmp_path: Path) -> None:
    train(recipe, tmp_path / "whole", 1, "engine.zero_stage=1")
    expected = losses(tmp_path / "whole")
    out = tmp_path / "moved"
    for last, nproc, stage in ((7, 1, 1), (14, 2, 2), (21, 2, 3), (28, 1, 0), (40, 1, 1)):
        train(recipe, out, nproc, f"engine.zero_stage={stage}", max_steps=last)
    found = losses(out)
    assert found.keys() == expected.keys()
    torch.testing.assert_close(
        torch.tensor(list(found.values())), torch.tensor(list(expected.values())), rtol=1e-5, atol=0
    )


def test_torchrun_starts_the_same_run(recipe: Path, tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, "-m", "pretrain", str(recipe), "--out", str(tmp_path / "a"), "--max-steps", "3"],
        capture_output=True, text=True, env=ENVIRONMENT, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    train(recipe, tmp_path / "b", 2, max_steps=3)
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


def test_validation_and_knn_do_not_touch_training(shards: Path, tmp_path: Path) -> None:
    """Supervised with everything that is judged on the way, against the same without; drop path draws randomness."""
    common = {
        "objective": {"kind": "supervised", "num_classes": 3},
        "model": {**MODEL, "options": {**MODEL["options"], "drop_path_rate": 0.3}},  # type: ignore[dict-item]
        "schedule": {"steps": 15},
        "engine": {"zero_stage": 3, "precision": "fp32"},
    }
    val = write_shards(tmp_path / "val", 27)  # no multiple of anything
    judged = write_recipe(
        tmp_path / "judged.yaml", shards, **common,
        validation={"every_epochs": 0.4},
        evals=[{"kind": "knn", "train": str(shards), "test": str(val), "every_epochs": 0.4, "k": 5}],
    )  # fmt: skip
    tree = yaml.safe_load(judged.read_text())
    tree["data"]["val"] = str(val)
    judged.write_text(yaml.safe_dump(tree))
    bare = write_recipe(tmp_path / "bare.yaml", shards, **common)
    train(judged, tmp_path / "judged", 2)
    train(bare, tmp_path / "bare", 2)
    assert losses(tmp_path / "judged") == losses(tmp_path / "bare")
    lines = [json.loads(line) for line in (tmp_path / "judged" / "metrics.jsonl").read_text().splitlines()]
    validated = {line["step"]: line for line in lines if "val/loss" in line}
    assert sorted(validated) == [5, 10, 15]
    assert validated[15]["val/top1"] > 0.6  # three colours: easily learnt
    assert [line["step"] for line in lines if "knn/top1_k5" in line] == [5, 10, 15]
    assert len(list((tmp_path / "judged" / "evals").glob("*.json"))) == 3


def test_overfit_batch_learns_one_batch_and_leaves_the_run_alone(recipe: Path, tmp_path: Path) -> None:
    pretrain("train", recipe, "--out", tmp_path / "run", "--overfit-batch", "--set", "schedule.steps=120")
    found = losses(tmp_path / "run-overfit")
    assert found[120] < 0.8 * found[1]
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


def rank_says(*arguments: object) -> tuple[int, str]:
    """Exit status and stderr of `python -m pretrain ARGUMENTS`, in a process that has imported it already."""
    with started(_rank_says, 1, list(map(str, arguments)), joined=False) as ranks:
        ((status, message),) = ranks.results()
    return status, message


def _rank_says(_: World, arguments: list[str]) -> tuple[int, str]:
    from pretrain.__main__ import main

    with redirect_stderr(io.StringIO()) as said:
        status = main(arguments)
    return status, said.getvalue()


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


class TestWrongInput:
    """Exit status 2, one message that says what to do, and nothing changed on disk."""

    def refused(self, folder: Path, *arguments: object, nproc: int | None = None) -> str:
        """By `pretrain train --nproc N`; else, quicker, by what each of its ranks runs."""
        before = snapshot(folder)
        if nproc is not None:
            message = pretrain("train", *arguments, "--nproc", nproc, "--out", folder / "run", status=2).stderr
        else:
            status, message = rank_says(*arguments, "--out", folder / "run")
            assert status == 2, message
        assert snapshot(folder) == before
        assert "Traceback" not in message
        assert message.count("error:") == 1
        return message

    @pytest.mark.parametrize("nproc", [1, 2])
    def test_missing_shard(self, recipe: Path, shards: Path, tmp_path: Path, nproc: int) -> None:
        copy = tmp_path / "data"
        shutil.copytree(shards, copy)
        (copy / "shard-000001.tar").unlink()
        message = self.refused(tmp_path, recipe, "--set", f"data.train={copy}", nproc=nproc)
        assert "shard-000001.tar" in message

    def test_missing_folder(self, recipe: Path, tmp_path: Path) -> None:
        assert "nowhere" in self.refused(tmp_path, recipe, "--set", f"data.train={tmp_path}/nowhere")

    def test_label_out_of_range(self, recipe: Path, tmp_path: Path) -> None:
        message = self.refused(tmp_path, recipe, "--set", "objective={kind: supervised, num_classes: 2}")
        assert "label" in message
        assert "2" in message

    def test_labels_missing(self, recipe: Path, tmp_path: Path) -> None:
        bare = write_shards(tmp_path / "bare", 10, label=False)
        message = self.refused(
            tmp_path,
            recipe,
            "--set",
            f"data.train={bare}",
            "--set",
            "objective={kind: supervised, num_classes: 2}",
        )
        assert "cls" in message

    def test_image_field_missing(self, recipe: Path, tmp_path: Path) -> None:
        import webdataset

        from data_pipeline.shards.scan import index_shards

        (tmp_path / "noimage").mkdir()
        with webdataset.TarWriter(str(tmp_path / "noimage" / "a.tar")) as writer:
            writer.write({"__key__": "0", "cls": b"0"})
        index_shards(str(tmp_path / "noimage"))
        assert "image" in self.refused(tmp_path, recipe, "--set", f"data.train={tmp_path}/noimage")

    def test_batch_not_divisible(self, recipe: Path, tmp_path: Path) -> None:
        message = self.refused(tmp_path, recipe, nproc=3)
        assert "6 or 9" in message

    def test_folder_of_another_run(self, recipe: Path, shards: Path, tmp_path: Path) -> None:
        train(recipe, tmp_path / "run", max_steps=1)
        message = self.refused(tmp_path, recipe, "--set", "optim.base_lr=0.5")
        assert "optim.base_lr" in message
        other = write_shards(tmp_path / "other", 101)
        assert "data.train" in self.refused(tmp_path, recipe, "--set", f"data.train={other}")

    def test_pipe_url(self, recipe: Path, tmp_path: Path) -> None:
        message = self.refused(tmp_path, recipe, "--set", f"data.train='pipe:touch {tmp_path}/owned'")
        assert "pipe" in message
        assert not (tmp_path / "owned").exists()
