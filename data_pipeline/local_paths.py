"""What a user may name a place by: a path of this machine, or, for data that are read, a URL without secrets.

Taken for a path, `s3://bucket/run` is a folder `s3:` in the working folder, which fills unseen.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from data_pipeline import url_secrets
from data_pipeline.errors import InputError

EXPECTED = "a path of this machine"
FIX = "Give a local or mounted path; only data are read from URLs (training, evaluation, `pretrain data verify`)."
_SCHEME = re.compile(r"\s*([A-Za-z][A-Za-z0-9+.-]+:)/")  # `Path` has made one slash of two


def url_scheme(path: str | Path) -> str | None:
    """Returns the scheme of a URL (`s3:`), also of one that has become a path; None: it is a path of this machine."""
    found = _SCHEME.match(os.fspath(path))
    return found[1] if found else None


def told_url(path: str | Path) -> str | None:
    """Returns what is to be said of a URL in the place of a path, by its scheme alone: the rest may hold a password."""
    scheme = url_scheme(path)
    return f"a URL ({scheme}//...)" if scheme else None


def refuse_url(where: str, path: str | Path) -> None:
    """Raises InputError, about `where`, for a URL."""
    if found := told_url(path):
        raise InputError(where=where, expected=EXPECTED, found=found, fix=FIX)


def refuse_secrets(where: str, place: object) -> None:
    """Raises InputError, about `where`, for a text that is or holds a URL with a password or a query."""
    if isinstance(place, str) and url_secrets.holds_secrets(place):
        raise InputError(where, url_secrets.EXPECTED, url_secrets.FOUND, url_secrets.FIX)


def path_text(text: str) -> str:
    """Returns a path of this machine as it is given; raises ValueError for a URL."""
    if found := told_url(text):
        raise ValueError(f"expected {EXPECTED}, found {found}. {FIX}")
    return text
