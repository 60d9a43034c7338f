"""Learning rates as the optimizer of a run was given them, logged at every step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.runs import train, write_recipe
from tests.shards import write_shards

SIMSIAM = {
    "model": {"name": "test_resnet", "image_size": 16},
    "objective": {"kind": "simsiam", "projector_width": 16, "predictor_width": 8},
}


def test_the_rate_of_undecayed_modules_stays_at_the_peak_and_is_logged_where_there_are_some(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards")
    schedule = {"kind": "cosine", "steps": 8, "warmup": 0.25}
    common = {"optim": {"base_lr": 0.01, "lr_batch": None}, "schedule": schedule, "checkpoint": {"every_steps": None}}
    logged = {}
    for name, groups in {"simsiam": SIMSIAM, "mae": {}}.items():
        train(write_recipe(tmp_path / f"{name}.yaml", shards, **common, **groups), tmp_path / name)
        lines = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        logged[name] = [line for line in lines if "loss" in line]
    decayed = [line["lr"] for line in logged["simsiam"]]
    undecayed = [line["undecayed_lr"] for line in logged["simsiam"]]
    assert undecayed == pytest.approx([0.01 / 3, 0.02 / 3, *[0.01] * 6])
    assert decayed[:3] == undecayed[:3], "one warmup, to one peak"
    assert decayed[2:] == sorted(decayed[2:], reverse=True)
    assert decayed[-1] < 0.1 * undecayed[-1]
    assert [line["lr"] for line in logged["mae"]] == decayed
    assert not any("undecayed_lr" in line for line in logged["mae"])
