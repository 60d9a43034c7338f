"""What a test may take, many times what it does take: one that hangs fails, and says where it stood."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from types import FrameType

import pytest

SLOW_SECONDS = 1200  # a test that is marked slow, or runs on a cluster; others: `timeout` in pyproject.toml
DRILL_SECONDS = 3600


class TimeIsUpError(BaseException):
    """Neither an Exception nor pytest's failure: hypothesis takes those for a finding, and tries it again for ever."""


@pytest.hookimpl(wrapper=True)
def pytest_timeout_set_timer(item: pytest.Item) -> Iterator[None]:
    """pytest-timeout's alarm, which prints the stacks of all threads, but raising what nothing passes over."""
    result = yield
    alarm = signal.getsignal(signal.SIGALRM)

    def ring(number: int, frame: FrameType | None) -> None:
        try:
            alarm(number, frame)  # type: ignore[operator]
        except pytest.fail.Exception as error:
            raise TimeIsUpError(error.msg) from None

    if callable(alarm):
        signal.signal(signal.SIGALRM, ring)
    return result


def limit(items: list[pytest.Item]) -> None:
    """Gives the tests that are known to be long their time."""
    for item in items:
        if item.get_closest_marker("timeout") is not None:
            continue
        if item.nodeid.startswith("tests/drills/"):
            item.add_marker(pytest.mark.timeout(DRILL_SECONDS))
        elif item.nodeid.startswith("tests/slurm/") or item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.timeout(SLOW_SECONDS))
