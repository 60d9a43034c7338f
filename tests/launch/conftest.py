"""A PATH of a test's own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.launch.run_folders import Commands


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Commands:
    """No command of SLURM's on PATH but those that a test makes."""
    made = Commands(tmp_path / "commands")
    real = [part for part in os.environ["PATH"].split(":") if not (Path(part) / "sbatch").exists()]
    (tmp_path / "coreutils").mkdir()
    for name in ("cat", "sh"):
        found = next(Path(part, name) for part in os.environ["PATH"].split(":") if Path(part, name).exists())
        (tmp_path / "coreutils" / name).symlink_to(found)
    monkeypatch.setenv("PATH", ":".join([str(made.folder), str(tmp_path / "coreutils"), *real]))
    return made
