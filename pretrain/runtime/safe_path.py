"""Keeps what lies in the working folder from being imported in place of ours, as `python -m` puts it before all else.

With `python -P -m` the folder is not on the path; so it is with the console script, and in every process that we start.
Imports nothing but the standard library's own first modules.
"""

from __future__ import annotations

import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # the folder with our packages
PACKAGES = ("data_pipeline", "launch", "pretrain")


def leave_working_folder(module: str) -> None:
    """Takes the working folder off the path where `python -m MODULE` put it there, unless our packages lie in it.

    One that has something of our names is refused, with exit status 2: whether it or ours is found first depends on
    how a process is started. Anything else in it, such as a `numpy.py`, is left alone.
    """
    folder = os.getcwd()
    if sys.flags.safe_path or not sys.path or sys.path[0] not in ("", folder):
        return
    if os.path.realpath(folder) == os.path.realpath(ROOT):
        return
    if shadowing := names_in(folder):
        print(
            f"error: {folder}: expected a working folder without modules of our names, found {', '.join(shadowing)}. "
            f"Start it with `python -P -m {module}`, or rename them.",
            file=sys.stderr,
        )
        sys.exit(2)
    del sys.path[0]


def names_in(folder: str) -> list[str]:
    """Returns what in a folder would be imported in place of our packages."""
    files = [name for package in PACKAGES for name in (f"{package}.py", os.path.join(package, "__init__.py"))]
    return [name for name in files if os.path.isfile(os.path.join(folder, name))]
