"""A report that cannot be written: found before anything is computed; where it comes later, the number is shown."""

from __future__ import annotations

import errno
import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner

from data_pipeline.durable import check_writable
from data_pipeline.errors import InputError, RunError
from launch.commands.eval import app
from pretrain.evals.result import EvalReport
from tests.commands import pretrain
from tests.evals.conftest import Folders
from tests.evals.test_commands import evaluate, run
from tests.evals.test_rerun_and_ranks import VIT

__all__ = ["run"]  # a fixture
FIX = "Name another."


@contextmanager
def no_file_larger_than(num_bytes: int) -> Iterator[None]:
    """What a full disk does, to every user, root too."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_place_that_can_be_written_is_left_as_it_was(tmp_path: Path) -> None:
    check_writable(tmp_path / "not" / "yet" / "a.json", "the report", FIX)
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "a.json").mkdir()
    with pytest.raises(InputError, match=r"a.json: .* found a folder of that name"):
        check_writable(tmp_path / "a.json", "the report", FIX)
    with pytest.raises(InputError, match="the report can be written, found Not a directory"):
        check_writable(tmp_path / "file" / "b.json", "the report", FIX)
    with no_file_larger_than(10_000), pytest.raises(InputError, match="found File too large"):
        check_writable(tmp_path / "b.json", "the report", FIX)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "file"]


@pytest.mark.parametrize("kind", ["knn", "finetune"])
def test_nothing_is_computed_for_a_report_that_cannot_be_written(
    run: Path, folders: Folders, tmp_path: Path, kind: str
) -> None:
    (run / "evals").write_text("a file where reports of the run belong")
    words = [kind, str(run), "--train", folders.train, "--test", folders.test]
    more = ["--cache", str(tmp_path / "cache")] if kind == "knn" else ["--epochs", "1"]
    with pytest.raises(InputError, match=r"where the report can be written, found Not a directory .*--out FILE.json"):
        evaluate(*words, *more)
    assert not (tmp_path / "cache").exists()
    place = tmp_path / "file"
    place.write_text("x")
    with pytest.raises(InputError, match="Not a directory"):
        evaluate(kind, "no-such-encoder", *words[2:], *more, "--out", str(place / "a.json"))


def test_a_number_whose_report_cannot_be_written_is_shown(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["knn", *VIT, "--train", folders.train, "--test", folders.test, "--k", "5"]
    evaluate(*words, "--out", str(tmp_path / "a.json"))
    value = EvalReport.load(tmp_path / "a.json").value

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("pretrain.evals.result.durable_file", full)
    result = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "b.json")])
    assert isinstance(result.exception, RunError)
    assert "No space left on device" in str(result.exception)
    assert "b.json" in str(result.exception)
    assert f"{value:.2f}" in result.stdout
    assert "report:" not in result.stdout


@pytest.mark.parametrize("kind", ["knn", "fewshot"])
def test_names_of_files_need_not_be_utf_8(folders: Folders, tmp_path: Path, kind: str) -> None:
    """Neither those of images, which are keys, nor those of folders, which are classes."""
    options = {"knn": ["--k", "5", "--cache", "cache"], "fewshot": ["--shots", "1"]}[kind]
    told = {}
    for name, suffix in (("plain", b"x"), ("other", b"\xe9")):
        root = tmp_path / name
        for split in ("train", "test"):
            shutil.copytree(getattr(folders, split), root / split)
            for path in sorted((root / split).glob("*/*.jpg"))[::3]:
                os.rename(path, os.fsencode(path.with_suffix("")) + suffix + b".jpg")
            os.rename(root / split / "3", os.fsencode(root / split / "3") + suffix)
        words = [*VIT, "--train", "train", "--test", "test", *options, "--out", "a.json"]
        told[name] = pretrain("eval", kind, *words, folder=root).stdout
        pretrain("eval", "rerun", "a.json", folder=root)
        assert EvalReport.load(root / "a.json").n == 100
    expected, found = (EvalReport.load(tmp_path / name / "a.json") for name in told)
    assert [os.fsencode(key) for key in found.outcomes.keys if not key.isascii()]
    if kind == "knn":  # few-shot's draws go by keys
        assert found.value == expected.value
