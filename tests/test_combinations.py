"""Draws of combinations: the same in every run, and no value of an axis is left out."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tests.combinations import drawn


@given(st.sets(st.text(max_size=5), min_size=4, max_size=12), st.integers(1, 4), st.integers(1, 3))
def test_every_value_is_drawn_about_as_often(cases: set[str], stages: int, worlds: int) -> None:
    axes = list(range(stages)), [("ranks", n) for n in range(worlds)]
    found = drawn(cases, *axes)
    assert found.keys() == cases
    for at, axis in enumerate(axes):
        counts = [sum(combination[at] == value for combination in found.values()) for value in axis]
        assert max(counts) - min(counts) <= 1


def test_draws_stay_the_same() -> None:
    names = ["mae", "byol", "clip", "siglip"]
    found = drawn(names, (0, 1, 2, 3), (1, 2))
    assert found == drawn(reversed(names), (0, 1, 2, 3), (1, 2))
    assert found == {"clip": (2, 1), "byol": (1, 2), "mae": (3, 2), "siglip": (0, 1)}
