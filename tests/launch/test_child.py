"""Child processes run our own code wherever they are started, get the signals of their parent, and end with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest

from launch.ranks.child import start_child
from pretrain.runtime.signals import STOPPED
from tests.gate import until
from tests.launch.test_local import GIVEN_TO_ANOTHER_THREAD

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("where", ["current folder", "PYTHONPATH"])
def test_a_child_runs_our_code_where_other_modules_have_its_names(tmp_path: Path, where: str) -> None:
    for name in ("launch", "pretrain", "data_pipeline"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('theirs')\n")
    folder, environment = Path.cwd(), {**os.environ}
    if where == "PYTHONPATH":
        environment["PYTHONPATH"] = str(tmp_path)
    try:
        os.chdir(tmp_path if where == "current folder" else folder)
        child = start_child("launch.cli", ["--version"], environment=environment, piped=True)
    finally:
        os.chdir(folder)
    assert child.communicate(timeout=60)[0] == f"{version('pretrain')}\n"


COMMAND = """
import sys
from launch.ranks import child

start = child.start_child
child.start_child = lambda module, words: start("part", words)  # in place of the command line
sys.exit(child.run_command(sys.argv[1:]))
"""
PART = """
import os, pathlib, signal, sys, time

def heard(signum, frame):
    (folder / signal.Signals(signum).name).touch()
    if signum == signal.SIGUSR2 or (signum == signal.SIGTERM and "data" in sys.argv):
        os._exit(3)

folder = pathlib.Path(sys.argv[2])
for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(signum, heard)
(folder / "ready").touch()
while True:
    time.sleep(1)
"""


@pytest.mark.parametrize(("command", "heard"), [("train", True), ("data", False)])
def test_a_command_gets_the_signals_that_it_knows(tmp_path: Path, command: str, heard: bool) -> None:
    (tmp_path / "part.py").write_text(PART)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}"}
    parent = subprocess.Popen([sys.executable, "-c", COMMAND, command, str(tmp_path)], env=environment)
    until((tmp_path / "ready").exists)
    parent.send_signal(signal.SIGUSR1)
    if heard:
        until((tmp_path / "SIGUSR1").exists)
    else:
        time.sleep(0.3)
    parent.send_signal(signal.SIGTERM)
    assert parent.wait(timeout=60) == STOPPED
    assert (tmp_path / "SIGTERM").exists() != heard, "a training would take a second one for the end"
    assert (tmp_path / "SIGUSR2").exists() == heard
    assert (tmp_path / "SIGUSR1").exists() == heard


def test_a_signal_that_does_not_wake_the_main_thread_is_heard(tmp_path: Path) -> None:
    (tmp_path / "part.py").write_text(PART.replace('"ready"', '"0.json"'))
    (tmp_path / "1.json").touch()
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}"}
    program = GIVEN_TO_ANOTHER_THREAD + COMMAND
    parent = subprocess.Popen([sys.executable, "-c", program, "train", str(tmp_path)], env=environment)
    assert parent.wait(timeout=60) == STOPPED
    assert (tmp_path / "SIGUSR2").exists()


def test_a_second_signal_ends_the_command_at_once(tmp_path: Path) -> None:
    (tmp_path / "part.py").write_text(PART.replace("os._exit(3)", "pass"))
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}"}
    parent = subprocess.Popen([sys.executable, "-c", COMMAND, "train", str(tmp_path)], env=environment)
    until((tmp_path / "ready").exists)
    parent.send_signal(signal.SIGTERM)
    until((tmp_path / "SIGUSR2").exists)
    parent.send_signal(signal.SIGTERM)
    assert parent.wait(timeout=60) == 128 + signal.SIGTERM
