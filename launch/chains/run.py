"""`pretrain chain FILE`: stages one after another on this machine, each a command that goes on by itself.

A stage that is done is passed over; one that was interrupted is given its command again; one whose inputs or settings
are others than they were is refused (chain_folder.py).
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from data_pipeline.errors import RunError
from launch.chains.check import check_chain
from launch.chains.config import words_of
from launch.chains.folder import ChainFolder
from launch.ranks.launcher import STOPPING, handled_by


def run_chain(path: Path, out: Path | None, num_ranks: int) -> int:
    """Runs what is left of a chain. Returns the exit status: 0 when all of it is done.

    Args:
        path: of the chain's recipe.
        out: its folder; None: `runs/<name>`.
        num_ranks: processes of each training.

    Raises:
        InputError: a stage is wrong, or is not what lies in the folder; nothing was started.
        RunError: a stage failed.
    """
    chain = ChainFolder.of(path, out)
    check_chain(chain, num_ranks)
    for number, stage in enumerate(chain.stages, 1):
        head = f"[{number}/{len(chain.stages)}] {stage.name}"
        if chain.is_done(stage):
            print(f"{head}: done before", flush=True)
            continue
        words = words_of(stage, chain.folder, chain.out, num_ranks)
        print(f"{head}: pretrain {shlex.join(words)}", flush=True)
        status = _run(words)
        if status > 128:
            return status  # a signal to this process, which the stage has answered
        if status:
            raise RunError(
                where=f"stage {stage.name}", expected="its command to succeed", found=f"exit status {status}",
                fix="See what it said above; the same command goes on from there.",
            )  # fmt: skip
        chain.keep(stage)
    for line in _results(chain):
        print(line)
    return 0


def _run(words: list[str]) -> int:
    """`pretrain WORDS` in a process that ends with this one and gets its signals; 128 + N where signal N came."""
    # Of a group of its own, so that Ctrl-C reaches it once, through us.
    command = [sys.executable, "-m", "launch.ranks.rank", str(os.getpid()), "launch.cli", *words]
    asked: list[int] = []
    process = subprocess.Popen(command, process_group=0)

    def pass_on(signum: int, frame: FrameType | None) -> None:
        if signum in STOPPING:
            asked.append(signum)
        elif words[0] != "train":
            return  # it would end what does not know the signal
        process.send_signal(signum if len(asked) < 2 else signal.SIGKILL)

    with handled_by(pass_on):
        status = process.wait()
    return 128 + asked[0] if asked else status if status >= 0 else 1


def _results(chain: ChainFolder) -> Iterator[str]:
    """The last validation of each run, and each evaluation."""
    for stage in chain.stages:
        path = stage.output(chain.out)
        if stage.train is not None and (path / "metrics.jsonl").is_file():
            lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
            values = {k: v for line in lines for k, v in line.items() if k.startswith("val/")}
            yield f"{stage.name}: " + (", ".join(f"{k} {v:.4f}" for k, v in values.items()) or "trained")
        elif stage.evaluate is not None:
            report = json.loads(path.read_text())
            yield f"{stage.name}: {report['metric']} {report['value']:.2f} %"
