"""A long moving average against fp64; compiled blocks against plain ones. Both take long for what they show."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pretrain.optim.config import Ema
from pretrain.runtime.collectives import World
from tests.engine.test_engine import STAGES
from tests.engine.test_engine_options import outcome
from tests.optim.test_ema import averaged
from tests.ranks import run_ranks


def test_a_thousand_steps_of_a_slow_average_are_those_of_fp64(figure: Callable[[str], None]) -> None:
    for rank in run_ranks(averaged, 2, Ema(decay=0.9999, warmup=False), 1001):
        for stage in STAGES:
            worst = max(rank[stage]["errors"].values())
            figure(f"ZeRO {stage}: largest error of a tensor {worst:.1e}")
            assert worst < 1e-5
            assert rank[stage]["moved"] > 1e-2


def compiled_and_plain(world: World, kind: str) -> dict[int, list[list[float]]]:
    return {
        stage: [outcome(world, kind, "fp32", stage, {"compile": compiled})["losses"] for compiled in (False, True)]
        for stage in (0, 2)
    }


@pytest.mark.parametrize("kind", ["mae", "resnet"])
def test_compiled_blocks_compute_the_same(kind: str, figure: Callable[[str], None]) -> None:
    """Random numbers of dropout are drawn otherwise when compiled; the model of this test has none."""
    (found,) = run_ranks(compiled_and_plain, 1, f"{kind}, nothing dropped" if kind == "mae" else kind)
    for stage, (plain, compiled) in found.items():
        figure(f"{kind}, ZeRO {stage}: plain {plain}, compiled {compiled}")
        assert compiled == pytest.approx(plain, rel=1e-5)
