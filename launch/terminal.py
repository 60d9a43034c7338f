"""What commands print in tables goes through one console."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from pretrain.evals.result import EvalReport

WIDTH_OF_A_FILE = 160  # columns; where there is no terminal, rich would cut cells to fit 80


def table_console() -> Console:
    """A console for tables and the lines around them, as wide as the terminal, or wide enough for whole cells."""
    from rich.console import Console

    return Console(soft_wrap=True, width=None if sys.stdout.isatty() else WIDTH_OF_A_FILE)


def interval_text(report: EvalReport, metric: str) -> str:
    """The 95 % interval of a metric in percent; empty where it has none."""
    if metric not in report.intervals:
        return ""
    low, high = report.intervals[metric]
    return f"{low:.2f} to {high:.2f}"


def chance_text(report: EvalReport, metric: str) -> str:
    """What guessing gives of a metric in percent; empty where that is not known."""
    return f"{report.chance[metric]:.2f}" if metric in report.chance else ""
