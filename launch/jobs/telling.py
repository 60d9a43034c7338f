"""Words of a job that must never take it with them: its log may lie on a disk that is full."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import Any

from data_pipeline.errors import PretrainError
from data_pipeline.messages import visible
from launch.jobs.folder import JobFolder
from launch.slurm.commands import slurm

COMMENT = "pretrain: "  # what a comment of ours on a job begins with
_LONGEST_COMMENT = 400


def tell(text: str, *, error: bool = False) -> bool:
    """Prints a line; returns whether it could be written. What cannot be is dropped, for good where the stream keeps
    it: Python would try again as it ends, and end with another status.
    """
    stream = sys.stderr if error else sys.stdout
    try:
        print(visible(text, lines=True), file=stream, flush=True)
    except OSError:
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return False
    return True


def note(folder: JobFolder, event: str, **values: Any) -> bool:
    """Notes an event as `JobFolder.note` does; returns whether it could be written."""
    try:
        folder.note(event, **values)
    except OSError as failed:
        tell(f"error: {event} was not noted in {folder.path}: {failed.strerror or failed}", error=True)
        return False
    return True


def comment(job_id: str, text: str) -> None:
    """Leaves a word with SLURM, as the comment of a job whose folder takes none."""
    words = " ".join(f"{COMMENT}{visible(text, lines=True)}".split())[:_LONGEST_COMMENT]
    with suppress(PretrainError):
        slurm("scontrol", "update", f"JobId={job_id}", f"Comment={words}")
