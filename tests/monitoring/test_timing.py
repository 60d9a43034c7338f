"""Where a step's time goes, and what is said where data is the brake."""

from __future__ import annotations

import time
from functools import partial

import pytest
import torch

from pretrain.callbacks.health import Debounced, data_brake
from pretrain.runtime.stopwatch import Stopwatch

WAITING = {"data_wait": 0.4, "data_read": 0.1, "data_decode": 0.5, "data_transform": 0.2}


def test_what_an_inner_part_takes_the_outer_does_not() -> None:
    clock = Stopwatch(torch.device("cpu"))
    start = time.perf_counter()
    with clock.part("backward"):
        time.sleep(0.02)
        with clock.part("reduce"):
            time.sleep(0.05)
    with clock.part("reduce"):
        time.sleep(0.01)
    whole = time.perf_counter() - start
    taken = clock.take()
    assert taken.keys() == {"backward", "reduce"}
    assert taken["backward"] >= 0.02
    assert taken["reduce"] >= 0.06
    assert sum(taken.values()) < whole + 1e-6, "nothing is booked twice"
    assert clock.take() == {}


def test_a_part_that_fails_is_booked_and_closed() -> None:
    clock = Stopwatch(torch.device("cpu"))
    with pytest.raises(ZeroDivisionError), clock.part("forward"):
        1 / 0  # noqa: B018
    with clock.part("optimizer"):
        pass
    assert clock.take().keys() == {"forward", "optimizer"}


@pytest.mark.parametrize(
    ("change", "workers", "idle", "words"),
    [
        ({}, 1, 3, "runtime.num_workers=4"),
        ({}, 1, 0, "--short-side"),
        ({"data_read": 2.0}, 1, 3, "faster storage"),
        ({"data_transform": 2.0}, 0, 0, "data.views"),
    ],
)
def test_it_says_what_would_help(change: dict[str, float], workers: int, idle: int, words: str) -> None:
    told = data_brake(WAITING | change, workers, idle)
    assert told is not None
    assert "40%" in told
    assert words in told


def test_it_says_nothing_of_data_that_keeps_up() -> None:
    assert data_brake(WAITING | {"data_wait": 0.05}, 0, 8) is None


def test_it_is_said_once_it_lasts_and_then_not_again_for_long() -> None:
    check = partial(data_brake, num_workers=0, idle_cores=2)
    brake = Debounced(check, lasting=3, again=10)
    assert [brake(WAITING) is not None for _ in range(8)] == [False, False, True] + [False] * 5
    brake = Debounced(check, lasting=2, again=10)
    fine = WAITING | {"data_wait": 0.0}
    assert [brake(v) is not None for v in (WAITING, fine, WAITING, WAITING)] == [False, False, False, True]
