"""The result of a check: one line of `pretrain doctor`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from data_pipeline.errors import PretrainError
from data_pipeline.messages import visible

Level = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """What was checked and what was found; `fix` says what to do, and is empty where there is nothing to do."""

    level: Level
    what: str
    found: str
    fix: str = ""

    def __str__(self) -> str:
        told = visible(f"{self.found}{f'. {self.fix}' if self.fix else ''}", lines=True)
        head, *more = told.splitlines() or [""]
        return "\n".join([f"{self.level:8} {self.what:12} {head}", *(f"{'':21} {line.strip()}" for line in more)])


def ok(what: str, found: str) -> Finding:
    return Finding("ok", what, found)


def warning(what: str, found: str, fix: str) -> Finding:
    return Finding("warning", what, found, fix)


def error(what: str, found: str, fix: str) -> Finding:
    return Finding("error", what, found, fix)


def from_error(what: str, raised: PretrainError) -> Finding:
    """Returns the finding of an error of ours, which says itself what to do."""
    return Finding("error", what, str(raised))


def gigabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:,.1f} MB"
