"""Why a run failed, kept in its folder until it is begun again: `failure.json`, and the end of its log. No torch."""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from pathlib import Path

from data_pipeline.durable import append_line
from data_pipeline.url_secrets import without_secrets

FAILURE, LOG = "failure.json", "log-rank0.txt"


def note_failure(run: Path, words: str, *, rank: int = 0, trace: str = "") -> None:
    """Keeps the reason of a failure, unless another rank has: the others then fail because of that one.

    The failure itself is told elsewhere, so that a disk which takes no more words changes nothing.

    Args:
        words: the message, as it is printed.
        rank: that failed.
        trace: where it happened, for the log; empty: the message says all.
    """
    words, trace = without_secrets(words), without_secrets(trace)
    with suppress(OSError):
        os.close(os.open(run / FAILURE, os.O_CREAT | os.O_EXCL, 0o666))
        append_line(run / FAILURE, {"at": time.time(), "rank": rank, "why": words})
        with (run / LOG).open("a", encoding="utf-8", errors="backslashreplace") as log:
            log.write(f"{trace}error: {words}\n")


def forget_failure(run: Path) -> bytes | None:
    """Removes the reason, as the run is begun again. Returns the file, for `restore_failure`; None: there was none."""
    with suppress(OSError):
        kept = (run / FAILURE).read_bytes()
        (run / FAILURE).unlink()
        return kept
    return None


def restore_failure(run: Path, kept: bytes | None) -> None:
    """Puts a reason back that was forgotten, where the run was not begun again after all."""
    if kept is not None:
        with suppress(OSError):
            (run / FAILURE).write_bytes(kept)


def read_failure(run: Path) -> str | None:
    """Returns why a run failed, in one line; None: it did not, or was begun again since."""
    try:
        text = (run / FAILURE).read_text("utf-8", "replace")
    except OSError:
        return None
    try:
        return " ".join(str(json.loads(text)["why"]).split())
    except (ValueError, KeyError, TypeError):  # the disk was full
        return "it failed; the disk took no word of why"
