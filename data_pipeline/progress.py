"""Progress of anything that takes longer than a few seconds: a bar on a terminal, plain lines in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from data_pipeline.messages import visible

Item = TypeVar("Item")

LINE_SECONDS = 5.0


def track(iterable: Iterable[Item], *, label: str, total: int | None) -> Iterator[Item]:
    """The items of `iterable`, with progress on stderr as they are taken.

    Args:
        iterable: passed on unchanged, lazily.
        label: what is being done, e.g. "converting".
        total: how many items there will be; None: not known.
    """
    label = visible(label)
    return _bar(iterable, label, total) if sys.stderr.isatty() else _lines(iterable, label, total)


def _bar(iterable: Iterable[Item], label: str, total: int | None) -> Iterator[Item]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        yield from progress.track(iterable, total=total, description=label)


def _lines(iterable: Iterable[Item], label: str, total: int | None) -> Iterator[Item]:
    start = last = time.monotonic()
    count = 0
    for count, item in enumerate(iterable, 1):
        yield item
        now = time.monotonic()
        if now - last >= LINE_SECONDS:
            last = now
            print(_line(label, count, total, now - start), file=sys.stderr, flush=True)
    if last > start:
        print(_line(label, count, count, time.monotonic() - start), file=sys.stderr, flush=True)


def _line(label: str, count: int, total: int | None, seconds: float) -> str:
    if total is None:
        return f"{label}: {count:,} ({seconds:.0f} s)"
    left = seconds / count * (total - count) if count else 0.0
    return f"{label}: {count:,} of {total:,} ({seconds:.0f} s, about {left:.0f} s left)"
