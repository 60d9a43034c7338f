"""`pretrain eval` from its arguments to the report, and wrong input answered before anything is written."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

from data_pipeline.errors import InputError
from launch.cli import main
from launch.commands.eval import app
from pretrain.evals.result import EvalReport, compare
from pretrain.models.encoder_folders import save_encoder
from pretrain.models.encoders import build_encoder
from pretrain.recipe.files import dump
from pretrain.recipe.recipe import Recipe
from tests.evals.conftest import Folders

ARCHITECTURE = ["--image-size", "8", "--option", "patch_size=4", "--option", "depth=1"]


def evaluate(*arguments: str) -> Result:
    result = CliRunner().invoke(app, list(arguments))
    if result.exception is not None:
        raise result.exception
    return result


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    recipe = Recipe.model_validate(
        {
            "name": "small",
            "seed": 5,
            "data": {"train": "shards"},
            "model": {
                "name": "vit_tiny_patch16_224",
                "image_size": 8,
                "patch_size": 4,
                "options": {"depth": 1, "embed_dim": 24, "num_heads": 2},
            },
            "objective": {"kind": "supervised", "num_classes": 10},
            "optim": {"base_lr": 1e-3},
            "schedule": {"steps": 10},
            "batch": {"global_size": 8},
        }
    )
    torch.manual_seed(0)
    state = build_encoder(recipe.model).state_dict()
    data = recipe.data
    save_encoder(folder / "encoder", state, recipe.model, data.preprocessing(recipe.model.judged_size))
    (folder / "recipe.yaml").write_text(dump(recipe))
    return folder


def reports(run: Path) -> dict[str, EvalReport]:
    return {path.name: EvalReport.load(path) for path in (run / "evals").glob("*.json")}


def test_what_is_found_of_a_run_is_kept_in_it(run: Path, folders: Folders) -> None:
    data = ["--train", folders.train, "--test", folders.test]
    knn = evaluate("knn", str(run), *data, "--k", "10", "--k", "1", "--limit-test", "90")
    evaluate("knn", str(run), *data, "--k", "10", "--k", "1", "--limit-test", "90", "--num-workers", "1")
    evaluate("knn", str(run), *data, "--k", "10", "--random-init", "--limit-test", "90")
    evaluate("linear", str(run), *data, "--min-steps", "50", "--lr", "0.01", "--lr", "0.1")
    found = reports(run)
    tags = sorted(re.sub("-[0-9a-f]{8}.json", "", name) for name in found)
    assert tags == ["knn-encoder", "knn-random", "linear-encoder"]  # asked twice, kept once
    (report,) = (r for name, r in found.items() if name.startswith("knn-encoder"))
    assert report.n == 90
    assert f"{report.value:.2f}" in knn.stdout
    assert report.arguments["limit_test"] == 90
    (random,) = (r for name, r in found.items() if name.startswith("knn-random"))
    assert random.seeds == {"init": 5}
    assert random.weights_sha256 != report.weights_sha256


def test_out_is_where_the_report_goes(run: Path, folders: Folders, tmp_path: Path) -> None:
    data = ["--train", folders.train, "--test", folders.test, "--k", "5"]
    evaluate("knn", str(run), *data, "--out", str(tmp_path / "deep" / "a.json"))
    described = json.loads((tmp_path / "deep" / "a.json").read_text())
    assert described["metrics"]["top1_k5"] == described["value"]
    assert not (run / "evals").exists()


def test_a_weights_file_needs_its_architecture_and_then_is_judged(folders: Folders, tmp_path: Path) -> None:
    from pretrain.evals.sources.timm_names import Architecture

    options = {"patch_size": 4, "depth": 1}
    module = Architecture("vit_tiny_patch16_224", 8, options).build(num_classes=0)
    save_file(module.state_dict(), tmp_path / "weights.safetensors")
    data = ["--train", folders.train, "--test", folders.test, "--k", "5"]
    out = tmp_path / "a.json"
    arguments = [str(tmp_path / "weights.safetensors"), *data, "--out", str(out)]
    with pytest.raises(InputError, match="--model"):
        evaluate("knn", *arguments)
    assert not out.exists()
    evaluate("knn", *arguments, "--model", "vit_tiny_patch16_224", *ARCHITECTURE)
    assert EvalReport.load(out).encoder["options"] == options


def test_two_reports_are_compared_sample_by_sample(run: Path, folders: Folders, tmp_path: Path) -> None:
    data = ["--train", folders.train, "--test", folders.test, "--k", "5"]
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    evaluate("knn", str(run), *data, "--out", str(a))
    evaluate("knn", str(run), *data, "--random-init", "--out", str(b))
    shown = evaluate("compare", str(a), str(b)).stdout
    expected = EvalReport.load(a).value - EvalReport.load(b).value
    assert f"A - B: {expected:+.2f} points" in shown
    assert "over 100 test samples:" in shown
    with pytest.raises(InputError):
        evaluate("compare", str(a), str(tmp_path / "c.json"))


def test_reports_over_several_seeds_are_compared_over_them(run: Path, folders: Folders, tmp_path: Path) -> None:
    asked = ["--train", folders.train, "--test", folders.test, "--shots", "1", "--seeds", "3"]
    a, b, c = (tmp_path / f"{name}.json" for name in "abc")
    evaluate("fewshot", str(run), *asked, "--out", str(a))
    evaluate("fewshot", str(run), *asked, "--random-init", "--out", str(b))
    evaluate("fewshot", str(run), *asked[:-1], "2", "--random-init", "--out", str(c))
    first, second = EvalReport.load(a), EvalReport.load(b)
    assert first.value - second.value != pytest.approx(compare(first, second).difference, abs=0.01)
    shown = evaluate("compare", str(a), str(b)).stdout
    assert f"A - B: {first.value - second.value:+.2f} points" in shown
    assert "over 3 seeds:" in shown
    assert "over 100 test samples of the first seeds:" in evaluate("compare", str(a), str(c)).stdout


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        (["--out", "report.txt"], "--out"),
        (["--temperature", "0"], "--temperature"),
        (["--k", "301"], "300 training samples"),
        (["--train", "missing"], "missing"),
        (["--model", "resnet18"], "says its own architecture"),
        (["--option", "depth"], "KEY=VALUE"),
        (["--option", "depth=[1"], "KEY=VALUE"),
    ],
)
def test_wrong_input_writes_nothing(run: Path, folders: Folders, changed: list[str], told: str) -> None:
    before = sorted(run.rglob("*"))
    given = {"--train": folders.train, "--test": folders.test, "--k": "5", changed[0]: changed[1]}
    with pytest.raises(InputError, match=told):
        evaluate("knn", str(run), *(word for pair in given.items() for word in pair))
    assert sorted(run.rglob("*")) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused(run: Path, folders: Folders) -> None:
    with pytest.raises(InputError, match="no CUDA device"):
        evaluate("knn", str(run), "--train", folders.train, "--test", folders.test, "--k", "5", "--device", "cuda")


def test_a_user_sees_one_message_and_status_2(
    folders: Folders, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--train", folders.train, "--test", folders.train]
    monkeypatch.setattr(sys, "argv", ["pretrain", "eval", "knn", "resnet10", "--random-init", *data])
    assert main() == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert "Nearest timm models: " in said.err
    assert "Traceback" not in said.err


def test_help_loads_no_torch() -> None:
    code = "import sys, launch.commands.eval; assert not {'torch', 'timm', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_linear_chooses_among_poolings_and_blocks(run: Path, folders: Folders, tmp_path: Path) -> None:
    data = ["--train", folders.train, "--test", folders.test, "--out", str(tmp_path / "a.json")]
    tokens = ["--pooling", "own", "--pooling", "cls", "--pooling", "mean", "--blocks", "1"]
    evaluate("linear", str(run), *data, *tokens, "--solver", "lbfgs", "-C", "0.01", "-C", "0.1")
    protocol = EvalReport.load(tmp_path / "a.json").protocol
    assert protocol["readouts"] == ["own", "cls", "mean"]
    assert protocol["inverse_penalties"] == [0.01, 0.1]
    assert len(protocol["val_top1"]) == 6  # type: ignore[arg-type]


def test_linear_of_a_paper_can_be_made_smaller(run: Path, folders: Folders, tmp_path: Path) -> None:
    data = ["--train", folders.train, "--test", folders.test, "--out", str(tmp_path / "a.json")]
    smaller = [
        "--epochs",
        "2",
        "--warmup-epochs",
        "1",
        "--head-batch-size",
        "50",
        "--lr",
        "1",
        "--crop-scale",
        "0.5",
        "1",
    ]
    evaluate("linear", str(run), *data, "--paper", "mae", *smaller)
    protocol = EvalReport.load(tmp_path / "a.json").protocol
    found = [protocol[name] for name in ("paper", "num_steps", "warmup_steps", "batch_size", "learning_rates")]
    assert found == ["mae", 12, 6, 50, [1.0]]
    assert protocol["augmentation"]["random_resized_crop"]["scale"] == [0.5, 1.0]  # type: ignore[index]


@pytest.mark.parametrize(
    ("arguments", "where"),
    [
        (["--solver", "lbfgs", "--lr", "1", "--augment"], "--lr, --augment"),
        (["--solver", "lbfgs", "--paper", "mae"], "--paper"),
        (["-C", "1"], "--inverse-penalty"),
        (["--crop-scale", "0.1", "1"], "--crop-scale"),
        (["--paper", "mae", "--epochs", "5"], "--warmup-epochs"),
    ],
)
def test_linear_refuses_what_would_have_no_say(run: Path, folders: Folders, arguments: list[str], where: str) -> None:
    with pytest.raises(InputError, match=where):
        evaluate("linear", str(run), "--train", folders.train, "--test", folders.test, *arguments)
