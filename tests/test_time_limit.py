"""A test that hangs is ended, wherever it does."""

from __future__ import annotations

import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.time_limit import TimeIsUpError


def test_hypothesis_does_not_try_again_what_hung() -> None:
    tried = []

    @given(st.integers())
    def hang(number: int) -> None:
        tried.append(number)
        signal.raise_signal(signal.SIGALRM)

    with pytest.raises(TimeIsUpError, match="Timeout"):
        hang()
    assert len(tried) == 1
