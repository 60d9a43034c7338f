"""The tiers of the tests: which folders belong to which, how long each may take, and what is said of it at the end.

`pytest --tier NAME tests` collects one tier: the folders named below, or for `test` all that no other tier has. Without
the option every test is collected that pytest is given, and nothing is measured.
"""

from __future__ import annotations

import multiprocessing.process
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).resolve().parent
# CI fails a tier that takes longer than so many times its budget: its machines are shared and may be half as fast for a
# while, which is no fault of the change; a change that really doubles the time is caught.
CI_FACTOR = 1.5


@dataclass(frozen=True)
class Tier:
    """A part of the tests, named as its target in the Makefile.

    Attributes:
        minutes: that all of it may take on two idle cores.
        folders: below `tests`; empty: whatever no other tier has.
    """

    minutes: float
    folders: tuple[str, ...] = ()


TIERS = {
    "test": Tier(10),
    "test-cluster": Tier(8, ("slurm", "browser")),
    "drills": Tier(25, ("drills",)),
}


def belongs(folder: str, tier: str) -> bool:
    """Whether what lies in `tests/<folder>` is of the tier."""
    others = {name for other in TIERS.values() for name in other.folders}
    return folder in TIERS[tier].folders if TIERS[tier].folders else folder not in others


def verdict(seconds: float, tier: str, *, ci: bool) -> tuple[bool, str]:
    """Whether the tier fails for the time that it took, and a line that says how it stands to its budget."""
    budget = 60 * TIERS[tier].minutes
    line = f"make {tier}: {seconds:.0f} s of the {budget:.0f} s that it may take"
    if seconds <= budget:
        return False, line
    fails = ci and seconds > CI_FACTOR * budget
    return fails, f"OVER BUDGET: {line}" + (f", more than {CI_FACTOR:g} times as long: this fails" if fails else "")


class Measured:
    """Of one process of pytest: the time since it began, and how many processes it has started."""

    def __init__(self) -> None:
        self.began, self.processes = time.monotonic(), 0

    def count(self) -> None:
        """From now on. Processes that are started by those are not seen."""
        sys.addaudithook(self._hear)
        start = multiprocessing.process.BaseProcess.start

        def counted(process: multiprocessing.process.BaseProcess) -> None:
            self.processes += 1
            start(process)

        multiprocessing.process.BaseProcess.start = counted  # type: ignore[method-assign]

    def _hear(self, event: str, _: object) -> None:
        if event == "subprocess.Popen":
            self.processes += 1


MEASURED = pytest.StashKey[Measured]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--tier", choices=sorted(TIERS), help="collects this tier of the tests, and holds it to its budget"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[MEASURED] = Measured()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    tier, path = config.getoption("tier"), collection_path.resolve()
    if tier is None or not path.is_relative_to(TESTS) or path == TESTS:
        return None
    return None if belongs(path.relative_to(TESTS).parts[0], tier) else True


def pytest_collection_finish(session: pytest.Session) -> None:
    """What is started from here on, the tests start."""
    if session.config.getoption("tier") is not None:
        session.config.stash[MEASURED].count()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """A worker of pytest-xdist has ended: what it started is added here."""
    started: Mapping[str, int] = getattr(node, "workeroutput", {})
    node.config.stash[MEASURED].processes += started.get("processes", 0)


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    measured = session.config.stash[MEASURED]
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["processes"] = measured.processes
    elif _is_whole(session.config):
        fails, _ = verdict(time.monotonic() - measured.began, session.config.getoption("tier"), ci="CI" in os.environ)
        if fails and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _is_whole(config: pytest.Config) -> bool:
    """Whether all of a tier was asked for: a part of it has no budget."""
    narrowed = config.getoption("keyword") or config.getoption("markexpr")
    return config.getoption("tier") is not None and not narrowed and [Path(a).resolve() for a in config.args] == [TESTS]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.getoption("tier") is None:
        return
    measured, stats = config.stash[MEASURED], terminalreporter.stats
    seconds = time.monotonic() - measured.began
    tests = sum(len(stats.get(kind, [])) for kind in ("passed", "failed", "skipped", "error"))
    terminalreporter.section(f"make {config.getoption('tier')}")
    terminalreporter.write_line(f"{seconds:.0f} s, {tests} tests, {measured.processes} processes started by them")
    if _is_whole(config):
        _, line = verdict(seconds, config.getoption("tier"), ci="CI" in os.environ)
        terminalreporter.write_line(line, red="OVER" in line, bold="OVER" in line)
