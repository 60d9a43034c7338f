"""Parts that several messages have: the nearest known names, and a list that is cut where it gets long."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def nearest(name: str, known: Iterable[str], *, kind: str = "", cutoff: float = 0.5) -> str:
    """A sentence with the three known names that are most like `name`; empty where none is like it.

    Args:
        name: what was given.
        known: what could have been meant.
        kind: what these are, for the sentence.
        cutoff: least likeness in [0, 1] (difflib's ratio).
    """
    from difflib import get_close_matches  # which few processes need

    near = get_close_matches(name, list(known), n=3, cutoff=cutoff)
    return f"Nearest{kind and f' {kind}'}: {', '.join(near)}." if near else ""


def short_list(names: Sequence[str], most: int = 8) -> str:
    """The first names, and how many more there are."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
