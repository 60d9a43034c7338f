"""The copy of our packages that a job runs: a job that waits keeps the code that it was submitted with."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pretrain.runtime.versions import COPIED_COMMIT, commit

PACKAGES = ("data_pipeline", "pretrain", "launch")
UNFINISHED = ".tmp"
_ROOT = Path(__file__).resolve().parents[2]  # where the code that runs now lies


def code_folder(out: Path) -> Path:
    """Returns the folder in which `copied_code` puts the code for jobs of `out`, named by the hash of that code."""
    digest = hashlib.sha256()
    for path in _files():
        digest.update(str(path.relative_to(_ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return out / "code" / digest.hexdigest()[:12]


@contextmanager
def copied_code(code: Path) -> Iterator[None]:
    """Copies the packages, and the commit that they are of; what is there already is kept. A copy that this call has
    made is removed where the block fails, and what a killed process left of one at any time.
    """
    for left in code.parent.glob(f".*{UNFINISHED}"):
        shutil.rmtree(left, ignore_errors=True)
    if code.is_dir():
        yield
        return
    unfinished = code.with_name(f".{code.name}{UNFINISHED}")
    try:
        for path in _files():
            target = unfinished / path.relative_to(_ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        (unfinished / COPIED_COMMIT).write_text(commit() or "")
        os.rename(unfinished, code)
        yield
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.rmtree(code, ignore_errors=True)
        with suppress(OSError):
            code.parent.rmdir()  # unless other code is there
        raise


def _files() -> Iterator[Path]:
    for package in PACKAGES:
        for path in sorted((_ROOT / package).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                yield path
