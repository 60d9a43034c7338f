"""A chain killed or interrupted in the middle of a stage: what it started ends with it, and it goes on from there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from launch.chains.run import run_chain
from launch.commands.chain import evaluation_commands
from pretrain.checkpoints.checkpoint import complete_checkpoints
from pretrain.runtime.signals import STOPPED
from tests.launch.test_chain import out, ran, shards, tree_of, write_chain
from tests.launch.test_local import all_gone
from tests.runs import losses

pytestmark = pytest.mark.slow
__all__ = ["out", "ran", "shards"]  # fixtures

STEPS = 400


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGINT], ids=["SIGKILL", "SIGINT"])
def test_a_chain_that_is_stopped_goes_on_in_its_stage(
    tmp_path: Path,
    shards: Path,
    out: Path,
    ran: list[str],
    signum: signal.Signals,
) -> None:
    long = {"schedule.steps": STEPS, "checkpoint.every_steps": 2, "checkpoint.keep_last": 500}
    tree = tree_of(tmp_path, shards, teacher={"train": "r.yaml", "set": long})
    tree["stages"] = tree["stages"][1:3]
    path = write_chain(tmp_path, tree)
    process = subprocess.Popen(
        [sys.executable, "-m", "launch.cli", "chain", str(path), "--out", str(out)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"},
        # A shell that starts the tests in the background has its children ignore SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    started: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + 240
        while not complete_checkpoints(out / "teacher" / "checkpoints"):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        started = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signum)
        assert process.wait(100) == (-9 if signum == signal.SIGKILL else STOPPED)
    finally:
        process.kill()
        process.wait()
    assert started
    assert all_gone(started, 60)
    assert 0 < len(losses(out / "teacher")) < STEPS
    assert "left" not in json.loads((out / "chain" / "teacher.json").read_text())
    assert run_chain(path, out, 1, evaluation_commands) == 0
    assert ran == ["teacher", "labels"]
    assert "checkpoints/step_" in (out / "teacher" / "log-rank0.txt").read_text()
    assert sorted(losses(out / "teacher")) == list(range(1, STEPS + 1))
