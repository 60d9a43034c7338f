"""`pretrain eval zeroshot` and `retrieval` from their arguments to reports that can be compared."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from data_pipeline.errors import CheckpointError, InputError
from data_pipeline.procedural.make import make
from launch.commands.eval import app
from pretrain.evals.result import EvalReport
from pretrain.recipe.files import dump
from pretrain.recipe.recipe import Recipe
from tests.models.test_towers import saved
from tests.objectives import towers

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def evaluate(*arguments: object) -> Result:
    result = CliRunner().invoke(app, list(map(str, arguments)))
    if result.exception is not None:
        raise result.exception
    return result


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shapes") / "test"
    make("shapes", folder, num_samples=60, size=16, split="test", shard_size=50)
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    recipe = Recipe.model_validate(
        {
            "name": "small",
            "seed": 5,
            "data": {"train": "shards"},
            "model": towers.OPEN_CLIP.model_dump(),
            "objective": {"kind": "clip"},
            "optim": {"base_lr": 1e-3},
            "schedule": {"steps": 10},
            "batch": {"global_size": 8},
        }
    )
    saved(folder / "encoder", "clip")
    (folder / "recipe.yaml").write_text(dump(recipe))
    return folder


@pytest.mark.parametrize("command", ["zeroshot", "retrieval"])
def test_what_is_found_is_kept_and_compared(run: Path, shapes: Path, command: str) -> None:
    group = ["--group", f"held_out={CONFIGS / 'prompts' / 'shapes_held_out.txt'}"] if command == "zeroshot" else []
    shown = evaluate(command, run, "--test", shapes, *group).stdout
    evaluate(command, run, "--test", shapes, *group)
    evaluate(command, run, "--test", shapes, "--random-init", *group)
    found = {path.name: (path, EvalReport.load(path)) for path in (run / "evals").glob("*.json")}
    assert len(found) == 2  # asked twice, kept once
    (trained,) = (pair for name, pair in found.items() if name.startswith(f"{command}-encoder-"))
    (fresh,) = (pair for name, pair in found.items() if name.startswith(f"{command}-random-"))
    assert fresh[1].seeds == {"init": 5}
    assert fresh[1].weights_sha256 != trained[1].weights_sha256
    for name, value in trained[1].metrics.items():
        assert name in shown
        assert f"{value:.2f}" in shown
    assert ("top1 (held_out)" in trained[1].metrics) == (command == "zeroshot")
    compared = evaluate("compare", trained[0], fresh[0]).stdout
    assert f"A - B: {trained[1].value - fresh[1].value:+.2f} points" in compared


@pytest.mark.parametrize(
    ("command", "changed", "told"),
    [
        ("zeroshot", ["--templates", "no_such.txt"], "no_such"),
        ("zeroshot", ["--group", "held_out"], "NAME=FILE"),
        ("zeroshot", ["--classes", "no_such.txt"], "imagenet, or a file of names"),
        ("zeroshot", ["--classes", "imagenet"], "--classes: expected 48 names"),
        ("zeroshot", ["--group", "held_out=no_such.txt"], "no_such"),
        ("zeroshot", ["--out", "report.txt"], "--out"),
        ("zeroshot", ["--test", "missing"], "missing"),
        ("zeroshot", ["--weights", "w.safetensors"], "has its own"),
        ("retrieval", ["--caption-field", "text"], "--caption-field"),
        ("retrieval", ["--caption-key", "k", "--caption-lines"], "--caption-key"),
    ],
)
def test_wrong_input_writes_nothing(run: Path, shapes: Path, command: str, changed: list[str], told: str) -> None:
    before = sorted(run.rglob("*"))
    given = [] if "--test" in changed else ["--test", shapes]
    with pytest.raises(InputError, match=told):
        evaluate(command, run, *given, *changed)
    assert sorted(run.rglob("*")) == before


def test_a_path_that_is_not_there_is_no_name_of_open_clips(shapes: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"runs/clip: expected a run, .* found nothing there"):
        evaluate("retrieval", tmp_path / "runs" / "clip", "--test", shapes)


def test_an_encoder_without_a_text_tower_is_refused(run: Path, shapes: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="two towers"):
        evaluate("zeroshot", tmp_path / "empty", "--test", shapes)
