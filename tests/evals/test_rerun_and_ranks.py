"""A report's question asked again, and by several processes together: the same number."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import pytest
import timm
import torch
import typer
from typer.testing import CliRunner, Result

from data_pipeline.datasets.read import open_dataset
from data_pipeline.errors import InputError
from launch.commands.eval import app
from launch.commands.eval_rerun import differences
from launch.suites.words import command_words
from pretrain.evals.features.extract import Extraction
from pretrain.evals.features.store import FeatureStore
from pretrain.evals.knn.config import KnnConfig
from pretrain.evals.knn.protocol import Knn
from pretrain.evals.linear.config import LinearConfig
from pretrain.evals.linear.protocol import Linear
from pretrain.evals.result import EvalReport
from pretrain.runtime.collectives import World
from tests.evals.conftest import Folders, small_encoder
from tests.ranks import run_ranks

VIT = [
    "vit_tiny_patch16_224", "--random-init", "--image-size", "8", "--option", "patch_size=4", "--option", "depth=1",
    "--option", "embed_dim=24", "--option", "num_heads=2",
]  # fmt: skip


def invoke(*arguments: str) -> Result:
    result = CliRunner().invoke(app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def knn(folders: Folders, out: Path, *more: str) -> list[str]:
    data = ["--train", folders.train, "--test", folders.test]
    return ["knn", *VIT, *data, "--k", "5", "--k", "3", "--out", str(out), *more]


@pytest.fixture
def result(folders: Folders, tmp_path: Path) -> Path:
    out = tmp_path / "knn.json"
    assert (
        invoke(*knn(folders, out, "--seed", "3", "--limit-test", "90", "--cache", str(tmp_path / "f"))).exit_code == 0
    )
    return out


def test_a_report_s_question_has_the_same_answer_again(result: Path) -> None:
    before = result.read_bytes()
    again = invoke("rerun", str(result))
    assert again.exit_code == 0
    assert "the same number" in again.stdout
    assert "not as it was" not in again.stdout
    assert result.read_bytes() == before
    first, second = EvalReport.load(result), EvalReport.load(result.with_name("knn.rerun.json"))
    assert (second.value, second.n, second.seeds) == (first.value, 90, {"init": 3})


def test_the_part_of_a_weights_file_is_asked_for_again(folders: Folders, tmp_path: Path) -> None:
    module = timm.create_model("vit_tiny_patch16_224", img_size=8, patch_size=4, depth=1, embed_dim=24, num_heads=2)
    weights = {f"backbone.{name}": tensor for name, tensor in module.state_dict().items()}
    weights["projection.weight"] = torch.zeros(3)
    torch.save({"student": weights, "teacher": weights}, tmp_path / "dino.pth")
    part = ["--weights-key", "teacher", "--weights-prefix", "backbone."]
    source = [str(tmp_path / "dino.pth"), "--model", VIT[0], *VIT[2:], *part]
    data = ["--train", folders.train, "--test", folders.test, "--limit-test", "50"]
    asked = invoke("knn", *source, *data, "--k", "5", "--out", str(tmp_path / "knn.json"))
    assert "note: of the weights file 1 tensors do not begin with backbone.: left out" in asked.stdout
    again = invoke("rerun", str(tmp_path / "knn.json"))
    assert "the same number" in again.stdout
    assert "not as it was" not in again.stdout
    told = EvalReport.load(tmp_path / "knn.rerun.json").encoder["weights_part"]
    assert told == {"key": "teacher", "prefix": "backbone.", "left_out": 1}


def test_another_number_is_said_with_what_changed(result: Path) -> None:
    described = json.loads(result.read_text())
    described["value"] += 1
    described["arguments"]["seed"] = 4
    result.write_text(json.dumps(described))
    again = invoke("rerun", str(result), "--out", str(result.with_name("new.json")))
    assert again.exit_code == 1
    assert "ANOTHER NUMBER" in again.stdout
    assert "not as it was: weights_sha256" in again.stdout
    assert "not as it was: seeds: {'init': 3} then, {'init': 4} now" in again.stdout


def test_what_cannot_be_asked_again_is_refused(result: Path) -> None:
    with pytest.raises(InputError, match="another file"):
        invoke("rerun", str(result), "--out", str(result))
    report = EvalReport.load(result)
    replace(report, arguments={}).save(result)
    with pytest.raises(InputError, match="made during training"):
        invoke("rerun", str(result))
    assert not result.with_name("knn.rerun.json").exists()


def test_differences_name_every_part(result: Path) -> None:
    report = EvalReport.load(result)
    assert differences(report, report) == []
    changed = replace(
        report,
        n=91,
        protocol={**report.protocol, "k": 7},
        outcomes=replace(report.outcomes, predicted=(report.outcomes.predicted + 1) % 10),
    )
    assert differences(report, changed) == [
        "n: 90 then, 91 now",
        "protocol.k: 5 then, 7 now",
        "predictions: 90 of 91 differ",
    ]


def test_words_give_back_what_a_command_was_given() -> None:
    application = typer.Typer()

    @application.command()
    def one(
        name: str,
        number: int = 3,
        many: list[str] | None = None,
        pair: tuple[float, float] | None = None,
        flag: Annotated[bool, typer.Option("--flag")] = False,
        other: Annotated[bool | None, typer.Option("--other/--no-other")] = None,
        none: str | None = None,
    ) -> None:
        found.append((name, number, many, pair, flag, other, none))

    found: list[object] = []
    command = typer.main.get_command(application)
    values = {"name": "-x", "number": 5, "many": ["a", "-b"], "pair": (0.5, 1.0), "flag": True, "other": False, "x": 1}
    command.main(command_words(command, values), standalone_mode=False)
    command.main(command_words(command, {"name": "y", "flag": False, "other": True}), standalone_mode=False)
    assert found == [("-x", 5, ["a", "-b"], (0.5, 1.0), True, False, None), ("y", 3, None, None, False, True, None)]


def by_ranks(world: World, folders: Folders, store: str) -> list[dict[str, Any]]:
    """Of kNN and of a linear probe, what a report says and what it is called."""
    extraction = Extraction(rank=world.rank, world_size=world.size, store=FeatureStore(Path(store)))
    train, test = open_dataset(folders.train), open_dataset(folders.test)
    asked = KnnConfig(train=folders.train, test=folders.test, k=(7, 150), temperature=(0.07, 0.5))
    evaluators = [
        Knn(train, test, asked, extraction=extraction),
        Linear(
            train,
            test,
            LinearConfig(train="", test="", learning_rates=(0.01, 0.1), min_steps=60),
            extraction=extraction,
        ),
    ]
    found = [evaluator.run(small_encoder()) for evaluator in evaluators]
    return [
        {
            "metrics": r.metrics, "n": r.n, "predicted": r.outcomes.predicted.tolist(), "keys": list(r.outcomes.keys),
            "file": r.file_name,
        }
        for r in found
    ]  # fmt: skip


def test_any_number_of_ranks_gives_one_answer(folders: Folders, tmp_path: Path) -> None:
    one = by_ranks(World(), folders, str(tmp_path / "1"))
    keys = sorted(open_dataset(folders.test).read(i).key for i in range(100))
    for report in one:
        assert report["n"] == open_dataset(folders.test).num_samples == 100
        assert report["keys"] == keys  # every one once
    for of_rank in run_ranks(by_ranks, 3, folders, str(tmp_path / "3")):  # whose shares are not alike
        assert of_rank == one


def test_the_command_starts_its_ranks(folders: Folders, tmp_path: Path) -> None:
    values = []
    for ranks in (1, 2):
        out = tmp_path / f"{ranks}.json"
        words = knn(folders, out, "--nproc", str(ranks))
        if ranks == 1:
            said = invoke(*words).stdout
        else:
            command = [sys.executable, "-m", "launch.cli", "eval", *words]
            done = subprocess.run(command, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, done.stderr
            said = done.stdout
        assert said.count("report:") == 1
        report = EvalReport.load(out)
        values.append((report.value, report.n, report.outcomes.predicted.tolist()))
    assert values[0] == values[1]
    assert report.arguments["nproc"] == 2


@pytest.mark.parametrize("status", [0, 3])
def test_what_ranks_found_they_are_asked_again(result: Path, monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    """As `eval knn`, by as many; and where they fail, no report that stood there before is taken for theirs."""
    report = EvalReport.load(result)
    report = replace(report, arguments={**report.arguments, "nproc": 2})
    report.save(result)
    again = result.with_name("knn.rerun.json")
    report.save(again)
    started: list[list[str]] = []

    def launch(words: list[str], num_ranks: int, *, module: str) -> int:
        assert (num_ranks, module) == (2, "launch.cli")
        started.append(words)
        assert not list(again.parent.glob("knn.rerun.*")), "an older answer"
        if status == 0:
            report.save(again)
        return status

    monkeypatch.setattr("launch.ranks.launcher.launch", launch)
    done = invoke("rerun", str(result))
    assert done.exit_code == status
    assert ("the same number" in done.stdout) == (status == 0)
    ((*words, end, source),) = started
    assert words[:2] == ["eval", "knn"]
    assert words[words.index("--seed") + 1] == "3"
    assert (end, source) == ("--", "vit_tiny_patch16_224")


def test_ranks_without_a_shared_folder_are_refused(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="all 2 ranks share"):
        invoke(*knn(folders, tmp_path / "out.json"))


def test_a_colleague_s_report_is_asked_again_with_own_places(folders: Folders, tmp_path: Path) -> None:
    """Of the report there is its JSON alone; encoder and data lie elsewhere here."""
    module = timm.create_model("vit_tiny_patch16_224", img_size=8, patch_size=4, depth=1, embed_dim=24, num_heads=2)
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    theirs.mkdir()
    torch.save(module.state_dict(), theirs / "vit.pth")
    for name in ("train", "test"):
        shutil.copytree(getattr(folders, name), theirs / name)
    source = [str(theirs / "vit.pth"), "--model", VIT[0], *VIT[2:]]
    data = ["--train", str(theirs / "train"), "--test", str(theirs / "test"), "--limit-test", "50"]
    invoke("knn", *source, *data, "--k", "5", "--out", str(theirs / "knn.json"))
    theirs.rename(ours)
    (ours / "knn.safetensors").unlink()
    places: list[str] = []
    for name, place in (("encoder", "vit.pth"), ("train", "train"), ("test", "test")):
        with pytest.raises(InputError, match=rf"knn.json: {name}: .* which is not. Say where it is with --{name}"):
            invoke("rerun", str(ours / "knn.json"), *places)
        places += [f"--{name}", str(ours / place)]
    again = invoke("rerun", str(ours / "knn.json"), *places)
    assert again.exit_code == 0
    assert "the same number" in again.stdout
    assert "not as it was" not in again.stdout
    assert "are not compared" in again.stdout
    other = invoke("rerun", str(ours / "knn.json"), *places, "--test", folders.train)
    assert "not as it was: data.test" in other.stdout
    with pytest.raises(InputError, match=r"with its \.safetensors beside it"):
        EvalReport.load(ours / "knn.json")


def test_arguments_that_the_command_does_not_have_are_refused(result: Path) -> None:
    report = EvalReport.load(result)
    replace(report, arguments={**report.arguments, "whiten": None, "old": False}).save(result)
    assert "the same number" in invoke("rerun", str(result)).stdout
    before = result.with_name("knn.rerun.json").read_bytes()
    replace(report, arguments={**report.arguments, "whiten": 0.1}).save(result)
    with pytest.raises(InputError, match=r"arguments that `pretrain eval knn` has, found whiten 0\.1"):
        invoke("rerun", str(result))
    assert result.with_name("knn.rerun.json").read_bytes() == before
    with pytest.raises(InputError, match="--train: expected nothing"):
        invoke("rerun", str(zero_shot(result)), "--train", "data")


def zero_shot(result: Path) -> Path:
    """A report of a protocol that learns nothing."""
    report = EvalReport.load(result)
    path = result.with_name("zeroshot.json")
    replace(report, arguments={"command": "eval zeroshot", "towers": "ViT-B-32", "test": "data"}).save(path)
    return path
