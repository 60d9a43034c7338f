"""A real run that is killed and gone on with: its books add up to the time that passed."""

from __future__ import annotations

import json
import time
from dataclasses import astuple
from pathlib import Path

import pytest

from data_pipeline.durable import read_lines
from pretrain.checkpoints.checkpoint import complete_checkpoints
from pretrain.monitoring.goodput import FILE_NAME, read_goodput
from tests.runs import losses, running, train, write_recipe
from tests.shards import write_shards

pytestmark = pytest.mark.slow


def test_a_killed_run_books_all_of_its_time(tmp_path: Path) -> None:
    recipe = write_recipe(
        tmp_path / "r.yaml", write_shards(tmp_path / "train"),
        schedule={"steps": 90}, checkpoint={"every_steps": 40, "keep_last": 9},
    )  # fmt: skip
    out = tmp_path / "run"
    submitted = time.time()
    (out / "job").mkdir(parents=True)
    (out / "job" / "submitted.json").write_text(json.dumps({"submitted_at": submitted}))
    time.sleep(1)
    with running(recipe, out, 2) as ranks:
        while max(losses(out), default=0) < 50 or not complete_checkpoints(out / "checkpoints"):
            assert all(process.is_alive() for process in ranks.processes)
            time.sleep(0.01)
        for process in ranks.processes:
            process.kill()
            process.join()
        killed = time.time()
    events = [{"event": "start", "at": submitted + 1, "attempt": 0}, {"event": "end", "at": killed, "attempt": 0}]
    (out / "job" / "attempts.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    time.sleep(1)
    log = train(recipe, out, 2)
    ended = time.time()

    lines = read_lines(out / FILE_NAME)
    first, second = (line for line in lines if line["event"] == "start")
    found = read_goodput(out)
    assert found is not None
    assert found.total == pytest.approx(lines[-1]["at"] - submitted, abs=0.01)
    assert 0 <= ended - lines[-1]["at"] < 20, "tearing down and being joined"
    assert min(astuple(found)) > 0
    before = max(
        (line for line in lines[: lines.index(second)] if line["step"] <= second["step"]), key=lambda x: x["at"]
    )
    assert found.lost == pytest.approx(killed - before["at"], abs=0.01)
    assert found.lost > 0.05, "50 steps and more were taken, and 40 gone on from"
    assert second["step"] == 40
    queued = first["started"] - submitted + second["started"] - killed
    assert queued >= 2
    assert queued <= found.waiting < queued + 5
    assert f"{found}" in log
    assert log.splitlines()[-1].startswith("finished at step 90 of 90")
    assert len(lines) < 40, "few lines"
