"""Evaluations between steps: what goes wrong on the rank that judges is told by all of them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from torch import nn

from data_pipeline.errors import RunError
from pretrain.callbacks import evaluations
from pretrain.callbacks.evaluations import ProtocolEvaluation
from pretrain.evals.knn.config import KnnConfig
from pretrain.monitoring.log import MetricLog
from pretrain.runtime.collectives import World
from pretrain.runtime.state import Progress
from tests.ranks import run_ranks


class Refusing:
    def run(self, judged: object) -> Any:
        raise RunError("features of test", "at most 0 samples that an evaluation leaves out", "3")


def _judged(world: World, folder: Path) -> str:
    engine: Any = SimpleNamespace(
        objective=SimpleNamespace(encoder=None),
        whole_copy=lambda *_, **__: nn.Identity() if world.is_main else None,
    )
    log = MetricLog(folder, step=0, total_steps=2, active=world.is_main)
    config = KnnConfig(train="a", test="b")
    run: Any = SimpleNamespace(folder=folder)
    callback = ProtocolEvaluation(1, 0, config, Refusing(), engine, run, lambda: None, log)
    state: Any = SimpleNamespace(progress=Progress(1, 2, 8))
    try:
        with patch.object(evaluations, "judged_copy", lambda *_, **__: None):
            callback.evaluate(state)
    except RunError as error:
        return str(error)
    return "nothing was raised"


def test_a_judge_that_refuses_is_heard_on_every_rank(tmp_path: Path) -> None:
    said = "features of test: expected at most 0 samples that an evaluation leaves out, found 3."
    assert run_ranks(_judged, 2, tmp_path) == [said, said]
