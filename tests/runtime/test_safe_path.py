"""What lies in the working folder is never run in place of ours: each case is a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
THEIRS = "raise SystemExit('theirs')\n"


def answer(folder: Path, *words: str) -> tuple[int, str]:
    """Exit status and stderr of a command about a recipe that is not there."""
    done = subprocess.run(
        [*words, "x.yaml"], cwd=folder, capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("module", "name"),
    [("pretrain", "launch.py"), ("pretrain", "data_pipeline.py"), ("launch.cli", "pretrain/__init__.py")],
)
def test_a_folder_with_modules_of_our_names_is_refused(tmp_path: Path, module: str, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(THEIRS)
    status, said = answer(tmp_path, sys.executable, "-m", module, *(["show"] if module == "launch.cli" else []))
    assert status == 2
    assert said.startswith(f"error: {tmp_path}: expected a working folder without modules of our names, found {name}.")
    assert f"python -P -m {module}" in said


def test_other_modules_in_it_are_not_found(tmp_path: Path) -> None:
    for name in ("numpy.py", "yaml.py", "argparse.py", "torch.py"):
        (tmp_path / name).write_text(THEIRS)
    status, said = answer(tmp_path, sys.executable, "-m", "pretrain")
    assert (status, said.splitlines()[0]) == (2, "error: x.yaml: 1 problem")


def test_a_safe_path_and_the_console_script_are_ours_everywhere(tmp_path: Path) -> None:
    for name in ("pretrain.py", "launch.py", "data_pipeline.py", "numpy.py"):
        (tmp_path / name).write_text(THEIRS)
    script = str(Path(sys.executable).with_name("pretrain"))
    for words in ([sys.executable, "-P", "-m", "pretrain"], [script, "show"]):
        status, said = answer(tmp_path, *words)
        assert (status, said.splitlines()[0]) == (2, "error: x.yaml: 1 problem"), words
