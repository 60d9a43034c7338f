"""What is known about a run's folder without torch: whether it is one, who is at work in it, its checkpoints."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import struct
from pathlib import Path

COMPLETE = "COMPLETE"  # the file that makes a checkpoint
LOCK = ".lock"
_CHECKPOINT = re.compile(r"step_(\d{8,18})")
_FLOCK = "hhqqi"  # struct flock of Linux on 64 bits: type, whence, start, length, process


def is_run(folder: Path) -> bool:
    """Whether a run was started or submitted there."""
    return any((folder / name).is_file() for name in ("recipe.yaml", "job/submitted.json"))


def folder_name(step: int) -> str:
    return f"step_{step:08d}"


def eval_name(index: int, kind: str) -> str:
    """The beginning of the file names of results of an entry of a recipe's `evals`."""
    return f"{kind}{index + 1}" if index else kind


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def all_folders(folder: Path) -> list[Path]:
    """Checkpoints, complete or torn, oldest first."""
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if _CHECKPOINT.fullmatch(p.name) and p.is_dir()), key=step_of)


def complete_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints that claim to be complete, oldest first; whether they are sound is known once they are opened."""
    return [p for p in all_folders(folder) if (p / COMPLETE).is_file()]


def newest_checkpoint(run: Path) -> Path | None:
    """The newest complete checkpoint of a run, or of any folder that has `checkpoints`; None: there is none."""
    complete = complete_checkpoints(run / "checkpoints")
    return complete[-1] if complete else None


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_claimed(run: Path) -> bool:
    """Whether a process other than this one has the folder for itself (record.py), here or, where the file system
    passes locks on, on another machine. Takes no lock, so that nobody who starts just then is turned away; but a
    process that has the folder itself would lose it by asking, as closing a file lets go of the locks on it.
    """
    try:
        descriptor = os.open(run / LOCK, os.O_RDONLY)
    except OSError:
        return False
    try:
        asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        kind, *_ = struct.unpack(_FLOCK, fcntl.fcntl(descriptor, fcntl.F_GETLK, asked))
        return bool(kind != fcntl.F_UNLCK)
    except OSError:  # no locks there, and so no claims
        return False
    finally:
        os.close(descriptor)
