"""What drills count and measure stands at the end of a run of them; what else they print only where they fail."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest

_NAME = "figure"


@pytest.fixture
def figure(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Takes a line for the summary."""
    return partial(record_property, _NAME)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for report in terminalreporter.stats.get("passed", []):
        for name, line in report.user_properties:
            if name == _NAME:
                terminalreporter.write_line(f"{report.nodeid.partition('::')[2]}: {line}")
