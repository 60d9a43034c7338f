"""The schedule as properties: ends, bounds, no jumps, up and then down, nothing but the step counts."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.recipe import Schedule
from pretrain.schedules import learning_rate
from pretrain.state import Progress

totals = st.integers(1, 400)
finals = st.floats(0, 1)
peaks = st.floats(1e-6, 10)


def rates(total: int, warmup: int, peak: float, final: float) -> list[float]:
    """Of every step of the run, and one past its end."""
    schedule = Schedule(steps=total, final_lr=final)
    return [
        learning_rate(Progress(step, total, 0), schedule, peak_lr=peak, warmup_steps=warmup)
        for step in range(total + 1)
    ]


@given(total=totals, share=st.floats(0, 1, exclude_max=True), peak=peaks, final=finals)
@settings(max_examples=100, deadline=None)
def test_rises_to_the_peak_then_falls_to_the_final_rate(total: int, share: float, peak: float, final: float) -> None:
    warmup = int(share * total)
    lr = rates(total, warmup, peak, final)
    assert lr[warmup] == pytest.approx(peak)
    assert lr[total] == pytest.approx(final * peak, abs=1e-12)
    assert all(a < b for a, b in pairwise(lr[: warmup + 1]))
    assert all(a >= b - 1e-12 * peak for a, b in pairwise(lr[warmup:]))
    assert all(0 < rate <= peak * (1 + 1e-12) for rate in lr[:total])


@given(total=totals, share=st.floats(0, 1, exclude_max=True), peak=peaks, final=finals)
@settings(max_examples=100, deadline=None)
def test_never_jumps(total: int, share: float, peak: float, final: float) -> None:
    """No step changes it by more than the warmup's slope, or the cosine's steepest."""
    warmup = int(share * total)
    lr = rates(total, warmup, peak, final)
    up, down = peak / (warmup + 1), peak * (1 - final) * math.pi / 2 / (total - warmup)
    for step, (a, b) in enumerate(pairwise(lr)):
        assert abs(b - a) <= (up if step < warmup else down) * (1 + 1e-9) + 1e-15


@given(total=st.integers(2, 400), peak=peaks, final=finals)
@settings(max_examples=50, deadline=None)
def test_is_halfway_down_in_the_middle(total: int, peak: float, final: float) -> None:
    assert rates(2 * total, 0, peak, final)[total] == pytest.approx(peak * (1 + final) / 2)


def test_is_linear_while_warming_up() -> None:
    assert rates(100, 4, 1.0, 0.0)[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, (1 + math.cos(math.pi / 96)) / 2])


@given(step=st.integers(0, 1000), seen=st.integers(0, 10**9))
@settings(max_examples=50, deadline=None)
def test_depends_on_nothing_but_steps_and_stays_at_the_end(step: int, seen: int) -> None:
    schedule = Schedule(steps=100, final_lr=0.1)
    lr = learning_rate(Progress(step, 100, seen), schedule, peak_lr=2.0, warmup_steps=10)
    assert lr == learning_rate(Progress(step, 100, 0), schedule, peak_lr=2.0, warmup_steps=10)
    if step >= 100:
        assert lr == pytest.approx(0.2)
