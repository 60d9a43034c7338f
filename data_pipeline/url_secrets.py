"""Secrets in URLs: a user with a password, a signed query, a token behind `#`. No word of ours shows them.

A place that is given with one is refused before anything is started or written; that much is enough for what commands
write. Words may still hold one that came from elsewhere: out of a file, a library's message, a shell line of a cluster
file. So all of them, on their way to a terminal, a log, a message or a page, go through `without_secrets`.
"""

from __future__ import annotations

import re
from typing import Any

EXPECTED = "a URL without user, password, query or fragment"
FOUND = "one with them (not shown here)"
FIX = "Give credentials in the environment: AWS_* variables or ~/.aws for s3://, ~/.netrc for https://."

_RUN = re.compile(r"[^\s\"<>]+")  # as far as a URL could go
_SCHEME = re.compile(r"(?<=[A-Za-z0-9+.-]{2}):/+")  # `Path` has made one slash of two
_PASSWORD = re.compile(r"(?:\[[^\]]*\])?+[^:]*:(?!\d+$)")  # begins at a colon with no port behind it
_TRAILING = "'`.,;:)]}"  # of the sentence around a URL, as far as anybody can tell
_QUERY = re.compile(rf"[?#](?=.)(?!\.\.\.[{re.escape(_TRAILING)}]*\Z)", re.DOTALL)  # not what is hidden


def without_secrets(text: str) -> str:
    """Returns a text with `...` for what could be secret in each URL that it holds; any other text as it is.

    A password in which a slash follows digits alone cannot be told from a port and a path.
    """
    return _RUN.sub(lambda found: hidden(found[0]), text) if ":/" in text else text


def tree_without_secrets(value: Any) -> Any:
    """Returns what JSON holds with every text in it as `without_secrets` gives it; keys are left alone."""
    if isinstance(value, dict):
        return {key: tree_without_secrets(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [tree_without_secrets(inner) for inner in value]
    return without_secrets(value) if isinstance(value, str) else value


def holds_secrets(place: str) -> bool:
    """Returns whether a place that a user gives, such as `data.train=s3://...`, is or holds a URL with secrets."""
    return "://" in place and hidden(place) != place


def hidden(place: str) -> str:
    """Returns what may be shown of a place, which is taken as a whole: spaces and quotes end no URL in it."""
    first = _SCHEME.search(place)
    if first is None:
        return place
    query = _QUERY.search(place, first.end())
    end = query.end() if query is not None else len(place)
    shown, at, last_user = list[str](), 0, place.rfind("@")
    for scheme in _SCHEME.finditer(place, first.start(), end):
        if scheme.start() < at:  # inside a password
            continue
        shown.append(place[at : scheme.end()])
        at = scheme.end()
        user_end = _end_of_user(place, at, last_user)
        if user_end > end:  # the `@` may stand in a query just as well, and no host can be told from it
            return "".join([*shown, "..."])
        if user_end >= 0:
            shown.append("...")
            at = user_end
    shown.append(place[at:end])
    return "".join(shown if query is None else [*shown, "...", place[len(place.rstrip(_TRAILING)) :]])


def _end_of_user(place: str, start: int, last_user: int) -> int:
    """Returns where the `@` stands behind user and password of the URL whose scheme ends at `start`; -1: nowhere.

    Args:
        last_user: where the last `@` of all stands. It is taken, as a password may hold others and slashes, though it
            should not.
    """
    host_end = place.find("/", start)
    host_end = host_end if host_end >= 0 else len(place)
    has_user = place.find("@", start, host_end) >= 0 or _PASSWORD.match(place, start, host_end)
    return last_user if has_user and last_user >= start else -1
