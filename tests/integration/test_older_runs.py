"""What an earlier version of this program wrote is gone on with: a run, its features, its evaluation.

`tests/fixtures/older_run` is such a folder; its README says how it was made.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from launch.cli import main
from tests.runs import losses, train

FIXTURE = Path(__file__).resolve().parents[1] / "fixtures" / "older_run"
RUN = Path("runs/tiny")
KNN = (
    "--train", "data/train", "--test", "data/test", "--k", "3", "--k", "5", "--temperature", "0.1", "--pooling", "mean",
    "--limit-train", "22", "--limit-test", "15", "--batch-size", "7", "--device", "cpu",
)  # fmt: skip


@pytest.fixture
def older(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the folder, as the current one: all paths in it are relative to it."""
    folder = Path(shutil.copytree(FIXTURE, tmp_path / "older"))
    monkeypatch.chdir(folder)
    return folder


def pretrain(*words: str) -> int:
    """The exit status of a command line, run in this process."""
    with patch.object(sys, "argv", ["pretrain", *words]):
        try:
            return main()
        except SystemExit as stop:
            return int(stop.code or 0)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def make_report(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The only evaluation of the run, and what it says."""
    (path,) = (folder / RUN / "evals").glob("*.json")
    return path, json.loads(path.read_text())


def identity(folder: Path) -> list[str]:
    """Of the run, and of its data."""
    found = re.findall(r"^(?:identity|data_fingerprint): *(\w+)$", (folder / RUN / "resolved.yaml").read_text(), re.M)
    assert len(found) == 2
    return found


def test_a_run_goes_on_where_it_was(older: Path) -> None:
    """On one rank after two, and with the losses of a run that was never interrupted: the same samples in the same
    order, masks and colors drawn alike, the same weights and optimizer state.
    """
    before = losses(older / RUN)
    assert sorted(before) == list(range(1, 11))
    where = [f"data.{split}={older / 'data' / folder}" for split, folder in (("train", "train"), ("val", "test"))]
    log = train(older / "recipe.yaml", older / RUN, 1, *where)
    new = log.removeprefix((FIXTURE / RUN / "log-rank0.txt").read_text())
    assert f"steps 10 to 20, from {older / RUN / 'checkpoints' / 'step_00000010'}" in new
    assert "starts anew" not in new  # the online probe
    assert "this run does not say which data" in new
    assert identity(older) == identity(FIXTURE)
    after = losses(older / RUN)
    assert {step: after[step] for step in before} == before
    uninterrupted = {int(step): loss for step, loss in json.loads((older / "losses.json").read_text()).items()}
    assert sorted(uninterrupted) == list(range(11, 21))
    assert {step: loss for step, loss in after.items() if step not in before} == pytest.approx(uninterrupted, rel=1e-4)


def test_features_that_are_kept_are_not_computed_again(older: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All images are blanked, so that whoever reads one fails. The answer goes into the file where the old one was."""
    (question, *_) = (json.loads(path.read_text()) for path in Path("cache").glob("*/question.json"))
    if other := {name: version(name) for name in question["versions"]}.items() - question["versions"].items():
        pytest.skip(f"features of other versions than {dict(other)} are rightly computed anew")
    path, before = make_report(older)
    kept = files(Path("cache"))
    for tar in Path("data").rglob("*.tar"):
        tar.write_bytes(bytes(tar.stat().st_size))
    knn = ("eval", "knn", str(RUN), *KNN)
    assert pretrain(*knn) == 2
    assert "shard-000000.tar" in capsys.readouterr().err
    path.unlink()
    assert pretrain(*knn, "--cache", "cache") == 0
    again, after = make_report(older)
    assert again == path
    for key in ("metrics", "n", "protocol", "data", "seeds", "weights_sha256"):
        assert after[key] == before[key], key
    assert (
        again.with_suffix(".safetensors").read_bytes()
        == (FIXTURE / path.relative_to(older).with_suffix(".safetensors")).read_bytes()
    )
    assert files(Path("cache")) == kept


def test_an_evaluation_is_asked_again_compared_and_reported(older: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, before = make_report(older)
    assert pretrain("report", str(RUN)) == 0
    assert "kNN, k = 3" in (older / RUN / "report.html").read_text()
    capsys.readouterr()
    assert pretrain("eval", "rerun", str(path)) == 0
    said = capsys.readouterr().out
    assert f"{before['value']:.4f} then, {before['value']:.4f} now: the same number" in said
    assert "weights_sha256" not in said
    assert not re.search(r"not as it was: (?!versions)", said)
    rerun = path.with_name(f"{path.stem}.rerun.json")
    arguments = json.loads(rerun.read_text())["arguments"]
    for name, value in before["arguments"].items():
        assert name in ("out", "cache") or arguments.get(name) == value, name
    assert pretrain("eval", "compare", str(path), str(rerun)) == 0
    assert pretrain("report", str(path), "--out", "compared") == 0
    assert list(Path("compared").glob("*.html"))


def test_the_folder_and_its_encoder_are_still_understood(older: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pretrain("status", str(RUN), "--json") == 0
    (state,) = json.loads(capsys.readouterr().out)
    assert (state["step"], state["total_steps"]) == (10, 20)
    assert pretrain("eval", "knn", str(RUN / "encoder"), *KNN, "--out", "encoder.json") == 0
    assert json.loads(Path("encoder.json").read_text())["weights_sha256"] == make_report(older)[1]["weights_sha256"]
