"""A slow momentum target against fp64 over a thousand steps; it takes long for what it shows."""

from __future__ import annotations

import pytest

from tests.pretrain.test_engine import STAGES
from tests.pretrain.test_momentum import check_followed, followed
from tests.ranks import run_ranks

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_thousand_steps_of_a_slow_target_are_those_of_fp64(world_size: int) -> None:
    """In bf16, at tau 0.9999 and rising by less than a millionth."""
    ranks = run_ranks(followed, world_size, 1000, 10**6, "slow byol")
    check_followed(ranks, 1e-5)
    for stage in STAGES:
        print(
            f"{world_size} ranks, ZeRO {stage}: largest error of a tensor {max(r[stage]['error'] for r in ranks):.1e}"
        )
