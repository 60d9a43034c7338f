"""A slow momentum target against fp64 over a thousand steps; it takes long for what it shows."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.engine.test_engine import STAGES
from tests.engine.test_momentum import check_followed, followed
from tests.ranks import started

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("stage", STAGES)
def test_a_thousand_steps_of_a_slow_target_are_those_of_fp64(stage: int, figure: Callable[[str], None]) -> None:
    """In bf16, on two ranks, at tau 0.9999 and rising by less than a millionth. A thousand unbiased roundings to fp32
    leave about sqrt(1000 / 12) steps of 1.2e-7, and one-sided ones thirty times as many.
    """
    with started(followed, 2, 1000, 10**6, "slow byol", (stage,), joined=True) as ranks:
        found = ranks.results(timeout=3600)  # bf16 is slow on CPUs that have no instructions for it
    check_followed(found, 2e-6)
    figure(f"ZeRO {stage}: largest error of a tensor {max(rank[stage]['error'] for rank in found):.1e}")
