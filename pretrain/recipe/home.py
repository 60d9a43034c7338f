"""`~` as the home folder wherever a path stands: in recipes and other typed files, and behind `--out=`."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from typing import Any


def expand_home(text: str) -> str:
    """Returns a text that is `~`, or begins with `~/`, with the home folder in its place; any other as it is."""
    return os.path.expanduser(text) if re.match(r"~(?:/|\Z)", text) else text


def expand_words(words: Iterable[str]) -> list[str]:
    """Expands the words of a command line; a shell leaves the `~` in `--out=~/runs` alone."""
    found = (re.fullmatch(r"(--[\w-]+=)?(.*)", word, re.DOTALL) for word in words)
    return [f"{match[1] or ''}{expand_home(match[2])}" for match in found if match is not None]


def expand_tree(value: Any) -> Any:
    """Expands every text in what YAML gives; keys are left alone."""
    if isinstance(value, dict):
        return {key: expand_tree(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(expand_tree(inner) for inner in value)
    return expand_home(value) if isinstance(value, str) else value
