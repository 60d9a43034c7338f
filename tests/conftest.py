"""Shared by all tests: where real data lies, and one thread per process so that two cores serve two processes.

Which tests belong together, and how long they may take, is in tiers.py: what needs a cluster is in `tests/slurm`, what
needs a browser in `tests/browser`, both for `make test-cluster`; `tests/drills` is `make drills`, all else `make test`.
"""

import importlib
import os
import signal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from pretrain.runtime import lean_imports
from tests.time_limit import limit, pytest_timeout_set_timer

pytest_plugins = ["tests.tiers"]
__all__ = ["pytest_timeout_set_timer"]  # a hook

lean_imports.install()  # as commands do, before any test imports torch
os.environ.setdefault("OMP_NUM_THREADS", "1")
# The same examples in every run, and as many of them on a slow machine: what passes does not depend on the day.
settings.register_profile("same", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("same")


def pytest_configure() -> None:
    """Signals do what they do to a program in the foreground: nohup and shells have those ignored that run behind them,
    every process that a test starts would inherit it, and what stops a command would not stop it."""
    for signum in (signal.SIGHUP, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        if signal.getsignal(signum) is signal.SIG_IGN:
            signal.signal(signum, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """Hypothesis draws constants out of the modules that are imported: also of those that only some tests import."""
    commands = [f"launch.commands.{name}" for name in importlib.import_module("launch.cli").COMMANDS]
    for name in ("launch.chains.submit", "launch.jobs.submit", "launch.ranks.rank", *commands):
        importlib.import_module(name)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with `cifar10.tar.gz` and `photos.tar`; PRETRAIN_TEST_DATA overrides where it is looked for."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("PRETRAIN_TEST_DATA", default))
    if not (folder / "cifar10.tar.gz").is_file():
        pytest.skip(f"real images not found in {folder}; set PRETRAIN_TEST_DATA")
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: two processes share the files, and one would be left alone with the last."""
    limit(items)
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How many tests ran on a SLURM cluster: where there is none they are skipped, which should not go unseen."""

    def count(kind: str) -> int:
        reports = terminalreporter.stats.get(kind, [])
        return sum(report.nodeid.startswith("tests/slurm/") for report in reports)

    ran, skipped = count("passed") + count("failed"), count("skipped")
    if ran or skipped:
        terminalreporter.write_line(f"SLURM: {ran} tests ran on a cluster of two nodes, {skipped} were skipped")
