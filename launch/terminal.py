"""What commands print in tables and beside them, with names out of data as text."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Column
from rich.text import Text

from data_pipeline.messages import visible

if TYPE_CHECKING:
    from pretrain.evals.result import EvalReport

WIDTH_OF_A_FILE = 160  # columns; where there is no terminal, rich would cut cells to fit 80


class _Plain(Console):
    """A console to which every string is text: no markup, no codes of emoji, nothing that a terminal would obey."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(visible(text, lines=True), **{**options, "markup": False, "emoji": False})


def terminal() -> Console:
    """The console of a command: lines are wrapped by the terminal alone, strings are shown as they are."""
    width = None if sys.stdout.isatty() else WIDTH_OF_A_FILE
    return _Plain(soft_wrap=True, markup=False, emoji=False, width=width)


def columns(*names: str) -> list[Column]:
    """Columns of a table, in which a long name is broken over lines and not cut."""
    return [Column(name, overflow="fold") for name in names]


def interval_text(report: EvalReport, metric: str) -> str:
    """The 95 % interval of a metric in percent; empty where it has none."""
    if metric not in report.intervals:
        return ""
    low, high = report.intervals[metric]
    return f"{low:.2f} to {high:.2f}"


def chance_text(report: EvalReport, metric: str) -> str:
    """What guessing gives of a metric in percent; empty where that is not known."""
    return f"{report.chance[metric]:.2f}" if metric in report.chance else ""
