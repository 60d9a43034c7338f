"""Which code runs, beside which packages. Imports no torch."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from importlib.metadata import distributions, version
from pathlib import Path

COPIED_COMMIT = "COMMIT"  # the file in which a job's copy of the code names the commit that it was made of

LIBRARIES = ("torch", "timm", "torchvision", "numpy")  # what any evaluation is computed by


def of(packages: Iterable[str]) -> dict[str, str]:
    return {name: version(name) for name in packages}


def installed() -> dict[str, str]:
    """Everything that is installed: what a number depends on is not known beforehand."""
    found = {str(package.metadata["Name"]).lower(): package.version for package in distributions()}
    return dict(sorted(found.items()))


def commit() -> str | None:
    """Returns the commit of this code, with `+` where the tree differs; None outside a checkout or a copy of one."""
    folder = Path(__file__).resolve().parents[1]
    copied = folder.parent / COPIED_COMMIT
    if copied.is_file():
        return copied.read_text() or None
    if not (folder.parent / "pyproject.toml").is_file():  # installed, perhaps below a checkout of something else
        return None
    try:
        head, changed = (
            subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10)
            for arguments in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return head.stdout.strip() + ("+" if changed.stdout else "") if head.returncode == 0 else None
