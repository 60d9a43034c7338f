"""The demo, small: it is killed, goes on, judges, reports; and goes on with whatever it finds complete."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path

import pytest

from data_pipeline.errors import DataError, InputError, RecipeError
from launch import demo
from pretrain.recipe.files import load_recipe
from pretrain.recipe.strict_yaml import read_yaml
from tests.commands import begun
from tests.gate import Gate, until

TOTAL, EVERY = 16, 4
pytestmark = pytest.mark.slow

SMALL = [
    "schedule.samples=null", f"schedule.steps={TOTAL}", "batch.global_size=8", f"checkpoint.every_steps={EVERY}",
    "logging.every_steps=1", "logging.tensorboard=false", "runtime.peak_tflops=0.1", "validation.every_epochs=99",
    "model.image_size=16", "objective.hidden_width=16", "objective.out_width=8",
]  # fmt: skip


def run_demo(out: Path, overrides: list[str]) -> None:
    demo.main(out, num_train=104, num_test=50, overrides=overrides)


def gated_demo(out: Path, gate: Gate) -> None:
    demo.PROBE_STEPS = 50
    gate.hold()
    run_demo(out, SMALL)


def logged_steps(out: Path) -> list[int]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if "loss" in line]


def test_it_is_killed_and_goes_on_to_a_judged_encoder_and_a_report(tmp_path: Path) -> None:
    out = tmp_path / "a demo: 1"  # a name that means something else to YAML and to a shell
    gate, resumed_from, killed_after = Gate(tmp_path / "gate"), TOTAL // 2, TOTAL // 2 + 2
    gate.open(killed_after)
    with begun(partial(gated_demo, out, gate)) as command:
        until((out / "interruption.json").is_file, meanwhile=command.running, said=command.said)
        gate.open(TOTAL)
        done = command.wait()
    assert done.status == 0, done
    said = done.stdout

    told = json.loads((out / "interruption.json").read_text())
    assert told["resumed_from"] == resumed_from
    assert told["killed_after"] > resumed_from
    assert told["killed_after"] <= killed_after
    starts = [line for line in (out / "log-rank0.txt").read_text().splitlines() if line.startswith("simclr_fractals: ")]
    assert [line.rsplit(", ", 1)[1].split("/")[-1] for line in starts] == [
        "from scratch",
        f"step_{told['resumed_from']:08d}",
    ]
    assert all("batch 8 = 2 x 1 x 4, ZeRO 2" in line for line in starts)
    assert logged_steps(out) == list(range(1, TOTAL + 1))

    page = (out / "report.html").read_text()
    for sentence in (f"after step {told['killed_after']}", f"checkpoint of step {told['resumed_from']}"):
        assert sentence in page
        assert sentence in said
    assert len(list((out / "evals").glob("*.json"))) == 4, "kNN and probe, of the encoder and of its random start"
    for protocol in ("kNN, k = 20", "linear probe"):
        assert protocol in page
        assert protocol in said
    assert said.splitlines()[-1] == f"report: {out / 'report.html'}"

    made = {path: path.stat().st_mtime_ns for path in [*out.glob("data/*/*"), *out.glob("checkpoints/*/*")]}
    (out / "report.html").unlink()
    with begun(partial(gated_demo, out, gate)) as command:
        again = command.wait().stdout
    assert {path: path.stat().st_mtime_ns for path in made} == made, "what is complete is kept"
    assert "is there already" in again
    assert (out / "report.html").read_text() == page


def test_a_folder_that_cannot_be_used_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="file"):
        run_demo(tmp_path / "file", SMALL)
    other = tmp_path / "other"
    other.mkdir()
    (other / "recipe.yaml").write_bytes(demo.RECIPE.read_bytes())
    with pytest.raises(RecipeError, match="holds another run") as told:
        run_demo(other, SMALL)
    assert "model.image_size" in str(told.value)
    assert os.listdir(other) == ["recipe.yaml"]
    strange = tmp_path / "strange"
    (strange / "data" / "train").mkdir(parents=True)
    (strange / "data" / "train" / "mine.txt").write_text("mine")
    with pytest.raises(DataError, match="other files"):
        run_demo(strange, SMALL)
    assert [path.name for path in strange.rglob("*") if path.is_file()] == ["mine.txt"]


def test_its_recipe_is_one_that_users_can_run() -> None:
    recipe = load_recipe(demo.RECIPE)
    assert recipe.name == demo.RECIPE.stem
    assert recipe.batch.global_size % demo.NUM_RANKS == 0
    assert recipe.engine.zero_stage == 2
    assert recipe.checkpoint.every_steps is not None
    assert recipe.checkpoint.every_steps % recipe.logging.every_steps == 0


@pytest.mark.parametrize("name", ["runs/demo", "/tmp/a b", "a: b", "{x}", "*", "#1", "ü", "~", "it's", '"'])
def test_a_path_survives_as_an_override(name: str) -> None:
    path = Path(name) / "data"
    assert read_yaml(demo._yaml(path)) == (str(path), [])


def test_progress_is_read_from_what_is_complete(tmp_path: Path) -> None:
    assert (demo._saved_step(tmp_path), demo._logged_step(tmp_path)) == (0, 0)
    for step in (50, 100):
        (tmp_path / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step_00000050" / "COMPLETE").touch()
    assert demo._saved_step(tmp_path) == 50, "the other one is torn"
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 60, "loss": 1.0}\n{"step": 70, "loss": 1.0}\n')
    assert demo._logged_step(tmp_path) == 70
