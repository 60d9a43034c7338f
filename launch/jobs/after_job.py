"""`python -m launch.jobs.after_job RUN STATUS`: what becomes of a job whose ranks have ended; on its first node.

The batch script calls it after srun, however that ended. A run, or a command, is done, or is queued again, or stops
with a reason; then the exit status is not 0, so that jobs which wait for this one are not started.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from data_pipeline.errors import PretrainError, RunError
from launch.jobs.eval_jobs import let_go
from launch.jobs.folder import JobFolder
from launch.jobs.job import FRUITLESS, Node, attempt_folder, stage_of
from launch.slurm.cluster import Cluster, load_cluster
from launch.slurm.commands import job_fields, slurm
from pretrain.runtime.signals import HUNG, STOPPED

T = TypeVar("T")

_GO_ON = {("data", "label"), ("eval", "finetune")}  # commands that go on where they were stopped; others begin again
_WORDS = {1: "the run failed", STOPPED: "asked to stop", HUNG: "no progress"}
_PATIENCE_SECONDS = 60.0  # with a controller that is busy; after a time limit SLURM ends the wait itself


@dataclass(frozen=True)
class Ending:
    """How an attempt ended, over all nodes."""

    status: int
    why: str


@dataclass(frozen=True)
class Next:
    """`event` is `done`, `requeue`, `stop` or `cancel`."""

    event: str
    why: str = ""


def ending(reports: Mapping[str, Mapping[str, object]], joined: set[str], nodes: list[str], status: int) -> Ending:
    """Of what the nodes reported; those that could not are named.

    Args:
        reports: by node, what it left.
        joined: nodes that were there at all.
        nodes: of the job.
        status: srun's.
    """
    by_status = {int(str(report["status"])): (node, str(report["why"])) for node, report in sorted(reports.items())}
    if 2 in by_status:
        node, why = by_status[2]
        return Ending(2, why or f"wrong input, see the log ({node})")
    if HUNG in by_status:  # the others were waiting, and some may have been killed for it
        node, why = by_status[HUNG]
        return Ending(HUNG, why or f"{_WORDS[HUNG]} ({node})")
    absent = [node for node in nodes if node not in joined]
    if absent and status < 128:  # nobody ended them before they could be there
        return Ending(2, f"{', '.join(absent)} did not see the run's folder, or could not start Python")
    if lost := [node for node in nodes if node not in reports]:
        return Ending(1, f"{', '.join(lost)} was lost")
    if set(by_status) == {0}:
        return Ending(0, "done")
    # What failed by itself, before what failed or was stopped because of it.
    order = (*(s for s in sorted(by_status, reverse=True) if s > 128), 1, *sorted(by_status), STOPPED)
    found = next(s for s in order if s in by_status and s != 0)
    node, why = by_status[found]
    killed = f"a rank was killed by signal {found - 128}" if found > 128 else f"exit status {found}"
    return Ending(found, why or f"{_WORDS.get(found, killed)} ({node})")


def decide(
    end: Ending,
    *,
    restart: int,
    max_requeues: int,
    cancelled: bool,
    queued: bool,
    step: int,
    fruitless: int,
    command: Sequence[str] = (),
) -> Next:
    """What to do with a run, or a command, of which an attempt has ended.

    Args:
        end: of this attempt.
        restart: how many times the job was queued again already.
        max_requeues: of the cluster file.
        cancelled: the user wants no more of it.
        queued: SLURM has queued the job again already.
        step: of the newest complete checkpoint.
        fruitless: attempts of the job in a row, this one included, that left no newer one.
        command: its words, where it is no run. It has no steps to get further by.
    """
    if end.status == 0:
        return Next("done")
    if cancelled:
        return Next("cancel", "cancelled" if command else f"cancelled at step {step}")
    if queued:
        return Next("requeue", f"{end.why}, by SLURM")
    if end.status == 2 and (restart == 0 or fruitless >= FRUITLESS):  # what began before is not wrong: a node may be
        return Next("stop", end.why)
    if restart >= max_requeues:
        return Next("stop", f"{end.why}; queued again {restart} times already, which is what max_requeues allows")
    if command:
        if end.status == STOPPED and tuple(command[:2]) in _GO_ON:
            return Next("requeue", end.why)
        return Next("stop", f"{end.why}: give it more time_minutes" if end.status == STOPPED else end.why)
    if fruitless and end.status != 2:
        fix = "see the log" if end.status != STOPPED else "give it more time_minutes, or save more often"
        return Next("stop", f"{end.why}, without a new checkpoint since step {step}: {fix}")
    return Next("requeue", end.why)


def main(run: Path, status: int) -> int:
    """Returns the exit status of the job."""
    node, folder = Node.from_environment(), JobFolder(run)
    cluster: Cluster = load_cluster(folder.cluster)
    submitted = folder.submitted()
    start = next((e for e in reversed(folder.starts(node.job_id)) if e["restart"] == node.restart), None)
    nodes = start["nodes"] if start is not None else [node.name]
    left = attempt_folder(run, node.job_id, node.restart)
    reports = {path.stem: json.loads(path.read_bytes()) for path in left.glob("*.json") if path.stem != "meeting"}
    for report in reports.values():
        if report["status"] == HUNG:
            report["why"] = _hang(folder, since=start["at"] if start is not None else 0)
    joined = {path.stem for path in left.glob("*.joined")}
    end = ending(reports, joined, nodes, status)
    step = folder.newest_step()
    attempt = start["attempt"] if start is not None else 0
    folder.note("end", attempt=attempt, status=end.status, why=end.why, step=step)
    fields = _patiently(lambda: job_fields(node.job_id) or {}) or {} if "SLURM_JOB_ID" in os.environ else {}
    then = decide(
        end,
        restart=node.restart,
        max_requeues=cluster.max_requeues,
        cancelled=folder.cancelled.exists() or is_cancelled(fields, node.restart),
        queued=is_queued(fields, node.restart),
        step=step,
        fruitless=folder.fruitless(node.job_id),
        command=submitted.get("words") or (),
    )
    if then.event == "done" and submitted.get("chain") is not None:
        then = _kept(submitted["chain"])
    if then.event == "requeue" and "SLURM_JOB_ID" not in os.environ:
        then = Next("stop", f"{then.why}; submitted again, it goes on")
    folder.note(then.event, attempt=attempt, why=then.why)
    print(f"{then.event}: {then.why}" if then.why else then.event, flush=True)
    if then.event != "requeue" and submitted.get("held"):
        let_go(Path(submitted["held"]))
    if then.event == "requeue" and not is_queued(fields, node.restart):
        if _patiently(lambda: _requeue(node)) is None:
            folder.note("stop", attempt=attempt, why="SLURM did not queue it again, see the log")
            return 1
        time.sleep(60)  # until the batch script is ended with it: nothing may come after
    return 0 if then.event == "done" else end.status if 0 < end.status < 256 else 1


def _requeue(node: Node) -> bool:
    try:
        slurm("scontrol", "requeue", node.job_id)
    except RunError:  # also where SLURM did it and could not say so in time
        if not is_queued(job_fields(node.job_id) or {}, node.restart):
            raise
    return True


def _patiently(ask: Callable[[], T]) -> T | None:
    """What SLURM answers, asked again while it fails; None: it did not for all this time."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            return ask()
        except RunError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            if time.monotonic() > deadline:
                return None
            time.sleep(5)


def _kept(what: Mapping[str, str]) -> Next:
    """A stage of a chain is done once that is written down."""
    try:
        chain, stage = stage_of(what)
        chain.keep(stage)
    except (PretrainError, OSError) as error:
        return Next("stop", f"it ended well, which could not be written down: {error}")
    return Next("done")


def _hang(folder: JobFolder, since: float) -> str:
    """What a rank's watchdog found in this attempt; empty where it could not write it down."""
    found = [json.loads(path.read_bytes()) for path in sorted(folder.path.glob("hang-*.json"))]
    return next((str(one["found"][0]["line"]) for one in found if one["at"] >= since), "")


def is_queued(fields: Mapping[str, str], restart: int) -> bool:
    """Whether SLURM has queued the job again by itself: preempted, a node lost, or `scontrol requeue`."""
    return int(fields.get("Restarts", 0)) > restart


def is_cancelled(fields: Mapping[str, str], restart: int) -> bool:
    """Whether SLURM ends the job for another reason than its time limit: somebody's scancel."""
    ending = fields.get("JobState") in ("COMPLETING", "CANCELLED")
    return ending and fields.get("Reason") != "TimeLimit" and not is_queued(fields, restart)


if __name__ == "__main__":
    try:
        sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
    except PretrainError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
