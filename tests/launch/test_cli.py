"""The console script as a user meets it: exit status, one message, nothing changed by wrong input."""

from __future__ import annotations

import argparse
import io
import json
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipeline.shards.scan import index_shards
from launch import cli
from pretrain.recipe.files import dump, load_recipe
from pretrain.recipe.strict_yaml import read_yaml
from pretrain.runtime.failure import read_failure
from pretrain.train_options import TrainOptions, add_arguments, options_from
from tests.commands import begun, program
from tests.data_pipeline.test_changing_files import read_beyond_the_end
from tests.recipe.recipes import SMALL, changed

Outcome = tuple[int, str, str]  # exit status, stdout, stderr


def write_shards(folder: Path, fields: tuple[str, ...] = ("jpg", "cls"), num_classes: int = 3) -> Path:
    """Two tars of eight samples, with their index and manifest."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for shard in range(2):
        with tarfile.open(folder / f"shard-{shard:06d}.tar", "w") as tar:
            for i in range(8):
                image = io.BytesIO()
                Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(image, "JPEG")
                content = {"jpg": image.getvalue(), "cls": str(i % num_classes).encode(), "txt": b"words"}
                for field in fields:
                    member = tarfile.TarInfo(f"{shard}-{i}.{field}")
                    member.size = len(content[field])
                    tar.addfile(member, io.BytesIO(content[field]))
    index_shards(str(folder))
    return folder


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


TINY = {
    **SMALL,
    "objective": {"kind": "supervised", "num_classes": 3},
    "model": {
        "name": "vit_tiny_patch16_224",
        "image_size": 32,
        "patch_size": 16,
        "options": {"embed_dim": 12, "depth": 1, "num_heads": 2},
    },
    "batch": {"global_size": 8},
    "schedule": {"steps": 2},
    "evals": [],
}


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: shards and a recipe of them that would run."""
    write_shards(tmp_path / "shards")
    (tmp_path / "recipe.yaml").write_text(json.dumps(TINY))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def pretrain(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """The entry point of the console script in this process, where torch is loaded once for all tests."""

    def call(*arguments: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["pretrain", *arguments])
        try:
            status = cli.main()
        except SystemExit as end:
            status = int(end.code or 0)
        return status, *capfd.readouterr()

    return call


def refused(folder: Path, call: Callable[..., Outcome], *arguments: str) -> str:
    """What a command that must be refused says: exit status 2, one message on stderr, nothing written."""
    before = snapshot(folder)
    status, out, err = call(*arguments)
    assert (status, out) == (2, ""), err
    assert snapshot(folder) == before
    err = "".join(line for line in err.splitlines(keepends=True) if not line.startswith("starting: "))
    assert err.startswith("error: ")
    assert err.count("error:") == 1
    assert "Traceback" not in err
    return err


def recipe_with(folder: Path, path: str, value: Any) -> str:
    (folder / "recipe.yaml").write_text(json.dumps(changed(path, value, TINY)))
    return "recipe.yaml"


# A recipe is wrong.


def test_an_unknown_key_is_answered_with_the_nearest(workplace: Path, pretrain: Callable[..., Outcome]) -> None:
    said = refused(workplace, pretrain, "show", recipe_with(workplace, "objective.num_clases", 3))
    assert "objective.num_clases: unknown key. Did you mean objective.num_classes?" in said


def test_a_wrong_type_is_answered_with_what_was_expected(workplace: Path, pretrain: Callable[..., Outcome]) -> None:
    recipe = recipe_with(workplace, "batch.global_size", "many")
    said = refused(workplace, pretrain, "train", recipe)
    assert "batch.global_size: expected a whole number, found 'many'." in said


def test_two_errors_are_told_at_once(workplace: Path, pretrain: Callable[..., Outcome]) -> None:
    recipe = recipe_with(workplace, "seed", 0.5)
    said = refused(workplace, pretrain, "train", recipe, "--set", "optim.lr=1", "--nproc", "2")
    assert "recipe.yaml: 2 problems" in said
    assert "seed: expected a whole number, found 0.5." in said
    assert "optim.lr: unknown key. Did you mean optim.base_lr?" in said


def test_a_key_that_stands_twice_is_named_with_its_lines(workplace: Path, pretrain: Callable[..., Outcome]) -> None:
    text = (workplace / "recipe.yaml").read_text()
    (workplace / "recipe.yaml").write_text(f"{text[:-1]},\nseed: 1,\nseed: 2}}")
    said = refused(workplace, pretrain, "train", "recipe.yaml")
    assert "line 3: expected each key once, found 'seed' again (first on line 2)" in said


def test_a_batch_that_the_ranks_do_not_divide_is_answered_with_sizes_that_work(
    workplace: Path, pretrain: Callable[..., Outcome]
) -> None:
    said = refused(workplace, pretrain, "show", "recipe.yaml", "--nproc", "3")
    assert "batch.global_size: expected a multiple of the number of processes, 3, found 8." in said
    assert "Nearest: batch.global_size 6 or 9, or 2 or 4 processes." in said


@pytest.mark.parametrize(
    "arguments",
    [["bogus"], ["train"], ["train", "r.yaml", "--nproc", "0"], ["show", "r.yaml", "--seed", "1"]],
    ids=" ".join,
)
def test_wrong_arguments_are_refused(pretrain: Callable[..., Outcome], arguments: list[str]) -> None:
    status, out, err = pretrain(*arguments)
    assert (status, out) == (2, "")
    assert "Usage:" in err
    assert "Traceback" not in err


def test_two_ranks_of_torchrun_tell_wrong_input_once(workplace: Path) -> None:
    """They have no parent of ours that looks first."""
    recipe = recipe_with(workplace, "seed", "x")
    before = snapshot(workplace)
    ranks = ["--nproc-per-node=2", "--master-port=0", "-m", "pretrain", recipe]
    with begun(program("torch.distributed.run", *ranks), workplace) as command:
        done = command.wait()
    assert done.status == 1
    assert done.stderr.count("seed: expected a whole number, found 'x'.") == 1
    assert snapshot(workplace) == before


def test_the_console_script_answers_likewise(workplace: Path) -> None:
    """In a process of its own, from another folder than the checkout."""
    recipe = recipe_with(workplace, "objective.num_clases", 3)

    def script(*arguments: str) -> Outcome:
        command = [str(Path(sys.executable).with_name("pretrain")), *arguments]
        done = subprocess.run(command, cwd=workplace, capture_output=True, text=True, timeout=120)
        return done.returncode, done.stdout, done.stderr

    assert "Did you mean objective.num_classes?" in refused(workplace, script, "show", recipe)
    assert script("--version") == (0, f"{version('pretrain')}\n", "")


# The data, the batch or the folder of the run is wrong.


@pytest.mark.parametrize("num_ranks", ["1", "2"])
def test_a_shard_that_is_missing_is_named(workplace: Path, pretrain: Callable[..., Outcome], num_ranks: str) -> None:
    (workplace / "shards" / "shard-000001.tar").unlink()
    said = refused(workplace, pretrain, "train", "recipe.yaml", "--nproc", num_ranks)
    assert "shard-000001.tar" in said


def test_data_that_are_not_there_are_named(workplace: Path, pretrain: Callable[..., Outcome]) -> None:
    assert "nowhere" in refused(workplace, pretrain, "train", "recipe.yaml", "--set", "data.train=nowhere")


def test_shards_without_images_are_refused(workplace: Path, pretrain: Callable[..., Outcome]) -> None:
    write_shards(workplace / "captions", fields=("txt", "cls"))
    said = refused(workplace, pretrain, "train", "recipe.yaml", "--set", "data.train=captions")
    assert "image field: expected one of jpg" in said


def test_labels_that_are_out_of_range_are_refused(workplace: Path, pretrain: Callable[..., Outcome]) -> None:
    write_shards(workplace / "more", num_classes=5)
    said = refused(workplace, pretrain, "train", "recipe.yaml", "--set", "data.train=more")
    assert "labels in [0, 3)" in said


def test_three_ranks_do_not_train_on_a_batch_of_eight(workplace: Path, pretrain: Callable[..., Outcome]) -> None:
    said = refused(workplace, pretrain, "train", "recipe.yaml", "--nproc", "3")
    assert "Nearest: batch.global_size 6 or 9, or 2 or 4 processes." in said


@pytest.mark.parametrize("more", [["--nproc", "2"], ["--overfit-batch"], ["--overfit-batch", "--nproc", "2"]])
def test_the_folder_of_another_recipe_is_left_alone(
    workplace: Path, pretrain: Callable[..., Outcome], more: list[str]
) -> None:
    folder = workplace / ("run-overfit" if "--overfit-batch" in more else "run")
    folder.mkdir()
    (folder / "recipe.yaml").write_text(dump(load_recipe(workplace / "recipe.yaml")))
    given = ["--set", "optim.base_lr=3e-4", "--out", "run"]
    said = refused(workplace, pretrain, "train", "recipe.yaml", *given, *more)
    assert f"{folder.name} holds another run: 1 problem\n" in said, "the advice is none"
    assert "optim.base_lr: 0.0003 given, 0.00015 kept" in said


# What is shown.


def test_show_prints_a_recipe_that_loads_and_what_follows(workplace: Path, pretrain: Callable[..., Outcome]) -> None:
    status, out, err = pretrain("show", "recipe.yaml", "--nproc", "2", "--set", "schedule.steps=5")
    assert (status, err) == (0, "")
    shown, _ = read_yaml(out)
    assert shown["schedule"]["steps"] == 5
    assert (shown["resolved"]["local_size"], shown["resolved"]["steps_per_epoch"]) == (4, 2.0)


def test_show_without_the_data_says_what_is_missing(workplace: Path, pretrain: Callable[..., Outcome]) -> None:
    status, out, err = pretrain("show", "recipe.yaml", "--set", "data.train=nowhere")
    assert status == 0
    assert read_yaml(out)[0]["data"]["train"] == "nowhere"
    assert "Without the data, no number of steps: nowhere" in err


@pytest.mark.parametrize(
    "command",
    [(), ("show",), ("train",), ("status",), ("logs",), ("doctor",), ("demo",), ("report",), ("data",), ("eval",)],
    ids=" ".join,
)
def test_help_is_of_the_command_and_ours_end_with_examples(
    pretrain: Callable[..., Outcome], command: tuple[str, ...]
) -> None:
    status, out, _ = pretrain(*command, "--help")
    assert status == 0
    assert f"Usage: {' '.join(('pretrain', *command))} [OPTIONS]" in out
    if command not in (("data",), ("eval",)):
        assert out.rsplit("\n\n", 1)[1].strip().startswith("Examples:")


@pytest.mark.parametrize("command", [name for name in cli.COMMANDS if name != "eval"])
def test_the_list_of_commands_says_of_each_what_its_own_help_says_first(
    pretrain: Callable[..., Outcome], command: str
) -> None:
    _, out, _ = pretrain(command, "--help")
    said = " ".join(out.split("\n\n")[1].split())
    assert said.startswith(cli.COMMANDS[command].removesuffix("."))


def test_a_training_is_given_the_same_options_by_both_of_its_commands(pretrain: Callable[..., Outcome]) -> None:
    given = TrainOptions(
        out=Path("run"), overrides=("a=1", "b.c=--x"), max_steps=3, overfit_batch=True, profile=2, evals_apart=True
    )
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert options_from(parser.parse_args(given.words())) == given
    assert options_from(parser.parse_args([])) == TrainOptions()
    _, out, _ = pretrain("train", "--help")
    flags = {option.flag for _, option, _ in TrainOptions.described() if not option.own_jobs_only}
    assert flags == {word for word in out.split() if word.startswith("--")} - {"--nproc", "--help"}


def test_version(pretrain: Callable[..., Outcome]) -> None:
    assert pretrain("--version") == (0, f"{version('pretrain')}\n", "")


def use_a_file_that_got_smaller(path: Path) -> None:
    sys.argv = ["pretrain", "--version"]
    with suppress(SystemExit):
        cli.main()
    read_beyond_the_end(path)


def test_a_command_that_a_mapped_file_ends_says_where_it_was(tmp_path: Path) -> None:
    (tmp_path / "mapped").write_bytes(b"1" * 4096)
    with begun(partial(use_a_file_that_got_smaller, tmp_path / "mapped")) as command:
        done = command.wait()
    assert done.status == -signal.SIGBUS
    assert "Bus error" in done.stderr
    assert "in read_beyond_the_end" in done.stderr


@pytest.mark.parametrize("overfit", [(), ("--overfit-batch",)])
def test_a_rank_that_was_killed_is_the_reason_that_its_run_keeps(
    workplace: Path, pretrain: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, overfit: tuple[str, ...]
) -> None:
    """Of a trial on one batch it is the trial's folder that says so."""
    folders = [workplace / "run", workplace / "run-overfit"]

    def killed(*_: object, **__: object) -> int:
        for folder in folders:
            folder.mkdir()
            (folder / "recipe.yaml").touch()
        return 128 + signal.SIGKILL

    monkeypatch.setattr("launch.ranks.launcher.launch", killed)
    status, _, err = pretrain("train", "recipe.yaml", "--nproc", "2", "--out", "run", *overfit)
    assert status == 128 + signal.SIGKILL, err
    reasons = [read_failure(folder) for folder in folders]
    assert [reason is not None for reason in reasons] == [not overfit, bool(overfit)]
    assert "a rank was killed by SIGKILL" in next(filter(None, reasons))
