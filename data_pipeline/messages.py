"""Parts that several messages have: the nearest known names, a list that is cut where it gets long, names as text."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterable, Sequence

from data_pipeline.url_secrets import without_secrets

# What a terminal or a browser does not show but obeys: control characters, marks that turn the direction of reading,
# separators of lines, and the halves of pairs by which Python holds the bytes of a name that is no UTF-8.
_OBEYED = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

_MEANINGS = {
    "SIGBUS": " (a file that it had mapped into memory got smaller or cannot be read any more, or /dev/shm is full)",
    "SIGKILL": " (perhaps for want of memory)",
}


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


def killed_by(signum: int) -> str:
    """A signal's name, and what it mostly means where a process could not say so itself."""
    name = signal.Signals(signum).name if signum in signal.valid_signals() else f"signal {signum}"
    return name + _MEANINGS.get(name, "")


def visible(text: str, *, lines: bool = False) -> str:
    """Text from outside as text: what would be obeyed instead of shown becomes an escape such as `\\x1b`, and what
    could be secret in a URL becomes `...`.

    Args:
        text: a name out of data, a path, or a message that holds some.
        lines: whether its line breaks and tabs are kept, as in a message of several lines.
    """
    text = without_secrets(text)
    return _OBEYED.sub(lambda found: found[0] if lines and found[0] in "\n\t" else ascii(found[0])[1:-1], text)


def reason(error: BaseException) -> str:
    """What went wrong, in a line: the system's words without their number and path, which `where` names already."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, RecursionError):
        return "parts within parts, deeper than can be followed"
    if isinstance(error, MemoryError):
        return "sizes for which there is no memory"
    return str(error).strip().partition("\n")[0] or type(error).__name__


def storage_or(fix: str, error: BaseException) -> str:
    """What to do about a file that could not be used: `fix`, unless storage failed to give it.

    Libraries raise an OSError of bytes that they do not understand, too; it has no number of the system's.
    """
    unread = isinstance(error, OSError) and error.errno is not None and not isinstance(error, FileNotFoundError)
    return "Look at the storage first: the file may well be sound." if unread else fix
