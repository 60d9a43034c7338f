"""What commands print in tables and beside them, with names out of data as text."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Column
from rich.text import Text

from data_pipeline.messages import visible


class _Plain(Console):
    """A console to which every string is text: no markup, no codes of emoji, nothing that a terminal would obey."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(visible(text, lines=True), **{**options, "markup": False, "emoji": False})


def terminal() -> Console:
    """The console of a command: lines are wrapped by the terminal alone, strings are shown as they are."""
    return _Plain(soft_wrap=True, markup=False, emoji=False)


def columns(*names: str) -> list[Column]:
    """Columns of a table, in which a long name is broken over lines and not cut."""
    return [Column(name, overflow="fold") for name in names]
