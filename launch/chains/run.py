"""`pretrain chain FILE`: stages one after another on this machine, each a command that goes on by itself.

A stage that is done is passed over; one that was interrupted is given its command again; one whose inputs or settings
changed is refused (launch/chains/folder.py).
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path

from data_pipeline.errors import RunError
from launch.chains.check import Evaluations, check_chain
from launch.chains.config import stage_words
from launch.chains.folder import ChainFolder
from launch.ranks.child import run_command
from pretrain.monitoring.log import evaluated
from pretrain.runtime.failure import read_failure
from pretrain.runtime.signals import STOPPED


def run_chain(path: Path, out: Path | None, num_ranks: int, evaluations: Evaluations) -> int:
    """Runs the stages of a chain that are left. Returns the exit status: 0 when all are done.

    Args:
        path: the chain's file.
        out: its folder; None: `runs/<name>`.
        num_ranks: processes of each training.
        evaluations: as of `check_chain`.

    Raises:
        InputError: a stage is wrong, or is not what lies in the folder; nothing was started.
        RunError: a stage failed.
    """
    chain = ChainFolder.open(path, out)
    check_chain(chain, num_ranks, evaluations)
    for number, stage in enumerate(chain.stages, 1):
        head = f"[{number}/{len(chain.stages)}] {stage.name}"
        if chain.is_done(stage):
            print(f"{head}: done before", flush=True)
            continue
        words = stage_words(stage, chain.folder, chain.out, num_ranks)
        print(f"{head}: pretrain {shlex.join(words)}", flush=True)
        status = run_command(words)
        if status == STOPPED or status > 128:
            return status  # a signal, which the stage has answered
        if status:
            raise RunError(
                where=f"stage {stage.name}", expected="its command to succeed",
                found=_found(status, stage.output(chain.out)),
                fix="See what it said above; the same command goes on from there.",
            )  # fmt: skip
        chain.keep(stage)
    for line in _results(chain):
        print(line)
    return 0


def _found(status: int, output: Path) -> str:
    """Says how a stage failed; a training leaves the reason in its folder."""
    why = read_failure(output)
    return f"exit status {status}" + (f" ({why.rstrip('.')})" if why else "")


def _results(chain: ChainFolder) -> Iterator[str]:
    """Yields the last validation of each run, and each evaluation, a line each."""
    for stage in chain.stages:
        path = stage.output(chain.out)
        if stage.train is not None and (path / "metrics.jsonl").is_file():
            lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
            values = {k: v for line in lines for k, v in line.items() if k.startswith("val/")}
            yield f"{stage.name}: " + (", ".join(f"{k} {evaluated(k, v)}" for k, v in values.items()) or "trained")
        elif stage.evaluate is not None:
            report = json.loads(path.read_text())
            yield f"{stage.name}: {report['metric']} {report['value']:.2f} %"
