"""`python -m launch.jobs.after_job RUN STATUS` decides, on a job's first node, what follows when its ranks have ended.

The batch script calls it after srun, however that ended. A run, or a command, is done, or is queued again, or stops
with a reason; then the exit status is not 0, so that jobs which wait for this one are not started.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, TypeVar

from data_pipeline.durable import write_text
from data_pipeline.errors import PretrainError, RunError
from launch.jobs.eval_jobs import release
from launch.jobs.folder import JobFolder
from launch.jobs.node import MAX_ATTEMPTS_WITHOUT_CHECKPOINT, Node, attempt_folder
from launch.jobs.telling import comment, note, tell
from launch.slurm.cluster import Cluster, load_cluster
from launch.slurm.commands import job_fields, slurm
from pretrain.runtime.signals import HUNG, STOPPED

T = TypeVar("T")

_RESUMABLE_COMMANDS = {
    ("data", "label"),
    ("eval", "finetune"),
}  # commands that go on where they were stopped; others begin again
_STATUS_TEXTS = {1: "the run failed", STOPPED: "asked to stop", HUNG: "no progress"}
_PATIENCE_SECONDS = 60.0  # with a controller that is busy; after a time limit SLURM ends the wait itself


@dataclass(frozen=True)
class Ending:
    """The way in which an attempt ended, over all nodes."""

    status: int
    why: str


@dataclass(frozen=True)
class Next:
    """What follows an attempt: `event` is `done`, `requeue`, `stop` or `cancel`."""

    event: str
    why: str = ""


def ending(reports: Mapping[str, Mapping[str, object]], joined: set[str], nodes: list[str], status: int) -> Ending:
    """Returns how an attempt ended, from what the nodes reported; nodes that could not report are named.

    Args:
        reports: what each node left, by its name.
        joined: nodes that were there at all.
        nodes: all nodes of the job.
        status: srun's exit status.
    """
    by_status = {int(str(report["status"])): (node, str(report["why"])) for node, report in sorted(reports.items())}
    if 2 in by_status:
        node, why = by_status[2]
        return Ending(2, why or f"wrong input, see the log ({node})")
    if HUNG in by_status:  # the others were waiting, and some may have been killed for it
        node, why = by_status[HUNG]
        return Ending(HUNG, why or f"{_STATUS_TEXTS[HUNG]} ({node})")
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
    return Ending(found, why or f"{_STATUS_TEXTS.get(found, killed)} ({node})")


def decide(
    end: Ending,
    *,
    restart: int,
    max_requeues: int,
    canceled: bool,
    queued: bool,
    step: int,
    without_checkpoint: int,
    command: Sequence[str] = (),
) -> Next:
    """Decides what to do with a run, or a command, when an attempt has ended.

    Args:
        end: how this attempt ended.
        restart: how many times the job was queued again already.
        max_requeues: the limit in the cluster file.
        canceled: the user wants no more of it.
        queued: SLURM has queued the job again already.
        step: that of the newest complete checkpoint.
        without_checkpoint: attempts of the job in a row, this one included, that left no newer checkpoint.
        command: the words of a command that is no run, which has no steps to get further by.
    """
    if end.status == 0:
        return Next("done")
    if canceled:
        return Next("cancel", "canceled" if command else f"canceled at step {step}")
    if queued:
        return Next("requeue", f"{end.why}, by SLURM")
    if end.status == 2 and (
        restart == 0 or without_checkpoint >= MAX_ATTEMPTS_WITHOUT_CHECKPOINT
    ):  # what began before is not wrong: a node may be
        return Next("stop", end.why)
    if restart >= max_requeues:
        return Next("stop", f"{end.why}; queued again {restart} times already, which is what max_requeues allows")
    if command:
        if end.status == STOPPED and tuple(command[:2]) in _RESUMABLE_COMMANDS:
            return Next("requeue", end.why)
        return Next("stop", f"{end.why}: give it more time_minutes" if end.status == STOPPED else end.why)
    if without_checkpoint and end.status != 2:
        fix = "see the log" if end.status != STOPPED else "give it more time_minutes, or save more often"
        return Next("stop", f"{end.why}, without a new checkpoint since step {step}: {fix}")
    return Next("requeue", end.why)


def main(run: Path, status: int, when_done: Callable[[JobFolder], Next] = lambda folder: Next("done")) -> int:
    """Decides what becomes of the job, does it, and returns the job's exit status.

    Args:
        run: the folder of the run, or of the command.
        status: srun's exit status.
        when_done: called where the attempt ended well: what else has to be done, and what comes of that.
    """
    node, folder = Node.from_environment(), JobFolder(run)
    cluster: Cluster = load_cluster(folder.cluster)
    submitted = folder.submitted()
    start = next((e for e in reversed(folder.starts(node.job_id)) if e["restart"] == node.restart), None)
    nodes = start["nodes"] if start is not None else [node.name]
    left = attempt_folder(run, node.job_id, node.restart)
    reports = {path.stem: json.loads(path.read_bytes()) for path in left.glob("*.json")}
    for report in reports.values():
        if report["status"] == HUNG:
            report["why"] = _found_by_watchdog(folder, since=start["at"] if start is not None else 0)
    joined = {path.stem for path in left.glob("*.joined")}
    end = ending(reports, joined, nodes, status)
    if set(nodes) - reports.keys() and (problem := _takes_no_file(run)):
        end = Ending(1, problem)  # whatever the nodes could not say
    step = folder.newest_step()
    attempt = start["attempt"] if start is not None else 0
    fields = _ask_patiently(lambda: job_fields(node.job_id) or {}) or {} if "SLURM_JOB_ID" in os.environ else {}
    then = decide(
        end,
        restart=node.restart,
        max_requeues=cluster.max_requeues,
        canceled=folder.canceled.exists() or is_canceled(fields, node.restart),
        queued=is_queued(fields, node.restart),
        step=step,
        without_checkpoint=folder.attempts_without_checkpoint(node.job_id),
        command=submitted.get("words") or (),
    )
    if then.event == "done":
        then = when_done(folder)
    if then.event == "requeue" and "SLURM_JOB_ID" not in os.environ:
        then = Next("stop", f"{then.why}; submitted again, it goes on")
    # Every action before every word: what a word is written to may be full, or hang.
    with _until_slurm_ends_it(then.event == "requeue" and not is_queued(fields, node.restart)) as asks:
        if asks and _ask_patiently(lambda: _requeue(node)) is None:
            then, end = Next("stop", "SLURM did not queue it again, see the log"), Ending(1, end.why)
        if then.event != "requeue" and submitted.get("held"):
            release(Path(submitted["held"]))
        noted = note(folder, "end", attempt=attempt, status=end.status, why=end.why, step=step)
        noted = note(folder, then.event, attempt=attempt, why=then.why) and noted
        words = f"{then.event}: {then.why}" if then.why else then.event
        if not (tell(words) and noted):
            comment(node.job_id, words)
        if asks and then.event == "requeue":
            time.sleep(60)  # until the batch script is ended with it: nothing may come after
    return 0 if then.event == "done" else end.status if 0 < end.status < 256 else 1


@contextmanager
def _until_slurm_ends_it(asks: bool) -> Iterator[bool]:
    """Ignores SIGTERM for a block that asks for a requeue: SLURM sends it with that, and leaves time for the words."""
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN) if asks else None
    try:
        yield asks
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _takes_no_file(run: Path) -> str:
    """Says why the run's folder takes no more files; empty: it does."""
    try:
        write_text(JobFolder(run).path / ".room", "x" * 4096)
        (JobFolder(run).path / ".room").unlink()
    except OSError as failed:
        return f"{run} takes no more files: {failed.strerror or failed}"
    return ""


def _requeue(node: Node) -> bool:
    try:
        slurm("scontrol", "requeue", node.job_id)
    except RunError:  # also where SLURM did it and could not say so in time
        if not is_queued(job_fields(node.job_id) or {}, node.restart):
            raise
    return True


def _ask_patiently(ask: Callable[[], T]) -> T | None:
    """Returns SLURM's answer, asking again while that fails; None: there was none in all this time."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            return ask()
        except RunError as error:
            tell(f"error: {error}", error=True)
            if time.monotonic() > deadline:
                return None
            time.sleep(5)


def _found_by_watchdog(folder: JobFolder, since: float) -> str:
    """Returns what a rank's watchdog found in this attempt; empty: it could not write that down."""
    found = [json.loads(path.read_bytes()) for path in sorted(folder.path.glob("hang-*.json"))]
    return next((str(one["found"][0]["line"]) for one in found if one["at"] >= since), "")


def is_queued(fields: Mapping[str, str], restart: int) -> bool:
    """Returns whether SLURM has queued the job again by itself: preempted, a node lost, or `scontrol requeue`."""
    return int(fields.get("Restarts", 0)) > restart


def is_canceled(fields: Mapping[str, str], restart: int) -> bool:
    """Returns whether SLURM ends the job for another reason than its time limit: somebody's scancel."""
    ending = fields.get("JobState") in ("COMPLETING", "CANCELLED")
    return ending and fields.get("Reason") != "TimeLimit" and not is_queued(fields, restart)


def run_program(when_done: Callable[[JobFolder], Next] = lambda folder: Next("done")) -> NoReturn:
    """Runs `main` with the arguments of this process, and ends the process with the job's exit status."""
    try:
        sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), when_done))
    except PretrainError as error:
        tell(f"error: {error}", error=True)
        sys.exit(error.exit_status)


if __name__ == "__main__":
    run_program()
