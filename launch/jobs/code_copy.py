"""The copy of our packages that a job runs: a job that waits keeps the code that it was submitted with."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
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
def copied_code(code: Path) -> Iterator[Callable[[], object]]:
    """Copies the packages, and the commit that they are of; what is there already is kept. A copy that this call has
    made is removed where the block fails, unless the block has called what it is given, as jobs may run the copy from
    then on. What a killed process left of one is removed at any time.
    """
    for left in code.parent.glob(f".*{UNFINISHED}"):
        shutil.rmtree(left, ignore_errors=True)
    with ExitStack() as undo:
        if not code.is_dir():
            undo.callback(_remove, code)
            _copy(code)
        yield undo.pop_all
        undo.pop_all()


def _copy(code: Path) -> None:
    unfinished = _unfinished(code)
    for path in _files():
        target = unfinished / path.relative_to(_ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    (unfinished / COPIED_COMMIT).write_text(commit() or "")
    os.rename(unfinished, code)


def _remove(code: Path) -> None:
    shutil.rmtree(_unfinished(code), ignore_errors=True)
    shutil.rmtree(code, ignore_errors=True)
    with suppress(OSError):
        code.parent.rmdir()  # unless other code is there


def _unfinished(code: Path) -> Path:
    return code.with_name(f".{code.name}{UNFINISHED}")


def _files() -> Iterator[Path]:
    for package in PACKAGES:
        for path in sorted((_ROOT / package).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                yield path
