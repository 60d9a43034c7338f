"""Which font shows which characters: names out of data are drawn as they are, whatever script they are in."""

from __future__ import annotations

from functools import cache
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from data_pipeline.messages import visible

FAMILY = "DejaVu Sans"  # comes with matplotlib, so that every machine has it
_WITHOUT_LETTERS = ("Last Resort", "STIX", "cm", "DejaVu", "Adobe Blank")  # boxes, formulas, or what DejaVu Sans has


class Run(NamedTuple):
    """A piece of a text that one font shows."""

    text: str
    family: str
    path: Path


def in_fonts(text: str) -> list[Run]:
    """A text in pieces, each with a font that has its characters; DejaVu Sans first, then any that is installed.

    What no font has, and what would not be shown, stands there as an escape such as `\\u4e2d`.
    """
    shown = "".join(c if font_with(c) is not None else ascii(c)[1:-1] for c in visible(text))
    pairs = [(c, font_with(c) or _default()) for c in shown]
    return [Run("".join(c for c, _ in run), *font) for font, run in groupby(pairs, key=lambda pair: pair[1])]


@cache
def font_with(character: str) -> tuple[str, Path] | None:
    """Family and file of a font that has a character; None: no installed one has it."""
    return next((font for font in (_default(), *_others()) if ord(character) in _characters(font[1])), None)


@cache
def _default() -> tuple[str, Path]:
    from matplotlib.font_manager import findfont  # which takes a while, and few processes need it

    return FAMILY, Path(findfont(FAMILY))


@cache
def _others() -> list[tuple[str, Path]]:
    from matplotlib.font_manager import fontManager

    found = {entry.name: Path(entry.fname) for entry in reversed(fontManager.ttflist) if entry.style == "normal"}
    return sorted(font for font in found.items() if not font[0].startswith(_WITHOUT_LETTERS))


@cache
def _characters(path: Path) -> frozenset[int]:
    from matplotlib.ft2font import FT2Font

    try:
        return frozenset(FT2Font(str(path)).get_charmap())
    except (OSError, RuntimeError):  # gone, or no font that FreeType reads
        return frozenset()
