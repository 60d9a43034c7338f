"""Where the recipes, chains, suites and cluster files lie that come with the code."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]


def configs_folder() -> Path:
    """Returns the folder `configs/` of the checkout, or the copy of it that a wheel installs inside the package."""
    installed = _PACKAGE / "configs"
    return installed if installed.is_dir() else _PACKAGE.parent / "configs"


def where_it_is(path: Path) -> str:
    """Returns a sentence that says where a missing file `configs/...` is installed; empty where there is none."""
    if path.exists() or path.parts[:1] != ("configs",):
        return ""
    ours = configs_folder().joinpath(*path.parts[1:])
    return f" The one that comes with pretrain is {ours}." if ours.is_file() else ""
