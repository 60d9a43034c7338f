"""Schedules as properties: ends, bounds, no jumps, up and then down, nothing but the step counts."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.optim.config import Constant, Cosine, Schedule, Steps
from pretrain.optim.schedules import learning_rate
from pretrain.runtime.state import Progress

totals = st.integers(1, 400)
finals = st.floats(0, 1)
peaks = st.floats(1e-6, 10)


def rates(total: int, warmup: int, peak: float, final: float) -> list[float]:
    """Of every step of the run, and one past its end."""
    return rates_of(Cosine(steps=total, final_lr=final), total, warmup, peak)


def rates_of(schedule: Schedule, total: int, warmup: int, peak: float) -> list[float]:
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
    schedule = Cosine(steps=100, final_lr=0.1)
    lr = learning_rate(Progress(step, 100, seen), schedule, peak_lr=2.0, warmup_steps=10)
    assert lr == learning_rate(Progress(step, 100, 0), schedule, peak_lr=2.0, warmup_steps=10)
    if step >= 100:
        assert lr == pytest.approx(0.2)


@given(total=totals, share=st.floats(0, 1, exclude_max=True), peak=peaks)
@settings(max_examples=50, deadline=None)
def test_constant_rises_to_the_peak_and_stays(total: int, share: float, peak: float) -> None:
    warmup = int(share * total)
    lr = rates_of(Constant(kind="constant", steps=total), total, warmup, peak)
    assert lr[:warmup] == rates(total, warmup, peak, 0.5)[:warmup]
    assert lr[warmup:] == [peak] * (total + 1 - warmup)


milestones = st.lists(st.floats(0.2, 0.99), min_size=1, max_size=4, unique=True).map(
    lambda shares: tuple(sorted(shares))
)


@given(total=totals, shares=milestones, gamma=st.floats(0.01, 1), peak=peaks)
@settings(max_examples=100, deadline=None)
def test_steps_down_once_at_each_milestone(total: int, shares: tuple[float, ...], gamma: float, peak: float) -> None:
    schedule = Steps(kind="step", steps=total, milestones=shares, gamma=gamma)
    warmup = int(0.1 * total)
    lr = rates_of(schedule, total, warmup, peak)
    assert lr[:warmup] == rates(total, warmup, peak, 0.5)[:warmup]
    assert lr[warmup] <= peak
    assert lr[total] == pytest.approx(peak * gamma ** len(shares))
    for step in range(warmup, total + 1):
        passed = [share for share in shares if step >= round(share * total)]
        assert lr[step] == pytest.approx(peak * gamma ** len(passed))


def test_a_milestone_is_where_it_is_written() -> None:
    """0.7 x 10 is a little more than 7 in floating point."""
    lr = rates_of(Steps(kind="step", steps=10, warmup=0, milestones=(0.3, 0.7)), 10, 0, 1.0)
    assert lr == pytest.approx([1, 1, 1, 0.1, 0.1, 0.1, 0.1, 0.01, 0.01, 0.01, 0.01])
