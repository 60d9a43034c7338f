"""Every error a user can meet, as one tree.

    PretrainError
    ├── InputError            what was given is wrong; nothing was started or changed (exit status 2)
    │   ├── RecipeError       a recipe, or an override of one
    │   ├── CheckpointError   a checkpoint, or weights that do not fit
    │   └── DataError         a dataset
    │       ├── SourceError   an image folder or archive that is to become shards
    │       ├── ManifestError a manifest or index: missing, damaged, not of these shards
    │       ├── ShardError    a tar: missing, damaged, refused
    │       ├── FieldError    samples lack what the run needs (an image, a label in range)
    │       └── SampleError   one sample cannot be used; a loader replaces and counts it
    └── RunError              the run failed after it had started (exit status 1)
        └── StorageError      a file could not be read or written: full, read-only, failing

A message names the field or path, what was expected, what was found, and the next step.
"""

import errno
import os
import re
from pathlib import Path

from data_pipeline.messages import visible


class PretrainError(Exception):
    """Base of all errors that are told to a user as one message, without a traceback.

    Args:
        where: the field or path it is about.
        expected: what would have been right.
        found: what was there.
        fix: what to do next, an imperative sentence; empty where `expected` already says it.
    """

    exit_status = 1

    def __init__(self, where: str, expected: str, found: str, fix: str = "") -> None:
        found = plain(found)
        self.where, self.expected, self.found, self.fix = where, expected, found, fix
        super().__init__(where, expected, found, fix)  # as given, so that it survives pickling

    def __str__(self) -> str:
        end = "" if self.found.endswith(".") else "."  # words of a library may be a sentence
        text = f"{self.where}: expected {self.expected}, found {self.found}{end}"
        return visible(f"{text} {self.fix}" if self.fix else text, lines=True)


class InputError(PretrainError):
    exit_status = 2


class RecipeError(InputError):
    """A recipe is wrong. `problems` holds all of them, each already a full sentence with its path; `fix` is none."""

    def __init__(self, where: str, problems: list[str], fix: str = "") -> None:
        self.problems = problems = [plain(problem) for problem in problems]
        PretrainError.__init__(self, where, "a valid recipe", f"{len(problems)} problem(s)", fix)
        self.args = (where, problems, fix)

    def __str__(self) -> str:
        head = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        told = "\n".join([f"{self.where}: {head}", *(f"  {line}" for line in [*self.problems, self.fix] if line)])
        return visible(told, lines=True)


class CheckpointError(InputError):
    pass


class DataError(InputError):
    pass


class SourceError(DataError):
    pass


class ManifestError(DataError):
    pass


class ShardError(DataError):
    pass


class FieldError(DataError):
    pass


class SampleError(DataError):
    pass


class RunError(PretrainError):
    pass


class StorageError(RunError):
    pass


def plain(text: str) -> str:
    """A text of a library for a user: without error numbers, and without objects by their addresses."""
    return re.sub(r"\[Errno -?\d+\] | ?<[^<>]* object at 0x[0-9a-f]+>", "", text)


_MENDS = {
    errno.ENOSPC: "Free space there, or name a folder that has room",
    errno.EDQUOT: "Free space within the quota, or name another folder",
    errno.EFBIG: "Raise the limit on the size of files, or name another folder",
    errno.EROFS: "Make it writable, or name a folder that is",
    errno.EACCES: "Give yourself the right to it, or name another folder",
    errno.EPERM: "Give yourself the right to it, or name another folder",
    errno.ENOENT: "Check the path, and that the file system is mounted",
    errno.ENOTDIR: "Check the path",
    errno.EISDIR: "Check the path",
    errno.EEXIST: "Remove it, or name another path",
    errno.ENAMETOOLONG: "Choose a shorter name",
    errno.EMFILE: "Raise the limit on open files (`ulimit -n`)",
}


def storage_error(error: BaseException) -> StorageError | None:
    """An operation of the system that failed, as a message with its path and what to do; None: it is another error.

    Args:
        error: an OSError, or one of a library that only tells the system's error number in words.
    """
    if not isinstance(error, OSError):
        told = re.search(r"\(os error (\d+)\)", str(error))  # as safetensors and others in Rust do
        if told is None:
            return None
        error = OSError(int(told[1]), os.strerror(int(told[1])))
    path = error.filename2 or error.filename
    where = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else ""
    fix = _MENDS.get(error.errno or 0, "Check the storage, and start again")
    temporary = "temporary directory" in str(error)  # of Python's own, which found no place for one
    if temporary or (where and Path(where).is_relative_to(os.environ.get("TMPDIR") or where + "-")):
        fix += "; TMPDIR says where temporary files go"
    return StorageError(
        where=where or ("TMPDIR" if temporary else "storage"),
        expected="to be read and written",
        found=error.strerror or str(error) or type(error).__name__,
        fix=f"{fix}.",
    )
