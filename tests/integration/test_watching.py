"""What a run shows of itself, and what it never writes down."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pretrain.monitoring.sinks import refuse_missing_wandb
from tests.commands import pretrain
from tests.runs import losses, train, write_recipe
from tests.shards import write_shards

SECRETS = {"WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567", "AWS_SECRET_ACCESS_KEY": "hush/hush+hush"}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    return write_recipe(
        folder / "r.yaml", write_shards(folder / "train"), schedule={"steps": 8},
        engine={"zero_stage": 3, "precision": "fp32"}, checkpoint={"every_steps": 3},
    )  # fmt: skip


WATCHED = "logging={every_steps: 1, images_every_steps: 3, wandb: {project: trial, mode: offline}}"


@pytest.fixture(scope="module")
def run(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "watched"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SECRETS.items():
            patch.setenv(name, value)
        train(recipe, out, 2, WATCHED, max_steps=4)
        train(recipe, out, 2, WATCHED, profile_steps=2)
    return out


def test_watching_changes_no_loss(recipe: Path, run: Path, tmp_path: Path) -> None:
    train(recipe, tmp_path / "bare", 2, "logging={every_steps: 1, tensorboard: false, images_every_steps: null}")
    assert losses(run) == losses(tmp_path / "bare")


def test_all_of_the_time_is_booked(run: Path) -> None:
    """Shares of the time since the last logged step, evaluation and checkpoint after that one included."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    parts = ("copy", "forward", "backward", "reduce", "optimizer", "checkpoint", "evaluation")
    for line in lines:
        shares = [line[f"time_{part}"] for part in parts]
        assert all(share >= 0 for share in shares)
        assert sum(shares) <= 1.001
    seen = {part: max(line[f"time_{part}"] for line in lines) for part in parts}
    assert all(share > 0 for share in seen.values()), seen
    assert max(sum(line[f"time_{part}"] for part in parts) for line in lines) > 0.5


def test_pictures_show_what_it_sees_and_paints(run: Path) -> None:
    names = sorted(path.name for path in (run / "images").iterdir())
    assert names == [f"step_0000000{step}.png" for step in (3, 4, 6, 8)]
    pixels = np.asarray(Image.open(run / "images" / names[-1]))
    assert pixels.shape == (4 * 16, 3 * 16, 3)  # a rank's samples; original, masked, filled
    original, masked, filled = np.split(pixels, 3, axis=1)
    hidden = (masked != original).any(-1)
    assert 0.5 < hidden.mean() < 0.8  # the mask ratio, but for pixels that happen to be of the mean colour
    assert (filled[~hidden] == original[~hidden]).all()
    assert (filled[hidden] != original[hidden]).any()


def test_weights_and_biases_has_it_all_offline_as_one_run(run: Path) -> None:
    stored = sorted((run / "wandb").glob("offline-run-*/*.wandb"))
    assert len(stored) == 2  # two starts, one id
    assert len({path.name for path in stored}) == 1
    assert (run / "wandb-id.txt").read_text() in stored[0].name
    for path in stored:
        data = path.read_bytes()
        assert b"grad_norm" in data
        assert b"images_per_second" in data
    assert list((run / "wandb").rglob("*.png"))


def test_the_trace_holds_the_steps(run: Path) -> None:
    for rank in range(2):
        trace = json.loads(gzip.decompress((run / "profile" / f"rank{rank}.json.gz").read_bytes()))
        names = {event.get("name", "") for event in trace["traceEvents"]}
        assert {"ProfilerStep#2", "ProfilerStep#3", "aten::native_layer_norm"} <= names
        assert "ProfilerStep#4" not in names


def test_it_says_what_it_ran_on(run: Path) -> None:
    environment = json.loads((run / "environment.json").read_text())
    assert environment["world_size"] == 2
    assert len(environment["hosts"]) == 2
    assert {"torch", "deepspeed", "timm", "numpy", "webdataset"} <= environment["packages"].keys()


def test_no_secret_is_in_any_file(run: Path) -> None:
    files = [path for path in run.rglob("*") if path.is_file()]
    assert len(files) > 10
    for path in files:
        data = path.read_bytes()
        for value in SECRETS.values():
            assert value.encode() not in data, path


def test_weights_and_biases_must_be_there(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from data_pipeline.errors import RecipeError
    from pretrain.recipe.files import load_recipe

    refuse_missing_wandb(load_recipe(recipe, [WATCHED]).logging, "run")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refuse_missing_wandb(load_recipe(recipe).logging, "run")
    with pytest.raises(RecipeError, match=r"logging\.wandb"):
        refuse_missing_wandb(load_recipe(recipe, [WATCHED]).logging, "run")


def test_a_run_says_that_it_starts_and_a_trace_is_no_error(recipe: Path, tmp_path: Path) -> None:
    done = pretrain("train", recipe, "--out", tmp_path / "run", "--profile", 1, "--set", "schedule.steps=3")
    told = [line for line in done.stderr.splitlines() if line.startswith("starting: ")]
    assert told[0] == "starting: loading PyTorch"
    assert str(tmp_path / "run") in told[1]
    assert "ERROR" not in done.stderr, "kineto, of a machine without a GPU"
    assert (tmp_path / "run" / "profile" / "rank0.json.gz").is_file()
