"""`pretrain drill` shows whether a run survives on this cluster, with this storage, before the quota is spent."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from data_pipeline.durable import read_lines
from data_pipeline.errors import InputError, RunError
from launch.jobs.cancel import cancel
from launch.jobs.folder import JobFolder
from launch.jobs.record import ENDINGS
from launch.jobs.submit import submit
from launch.slurm.commands import AT_WORK, WAITING, job_fields, shorten_requeue_delay, slurm
from pretrain.recipe.files import load_recipe

_POLL_SECONDS = 0.5
_ASK_SECONDS = 5.0  # between questions to SLURM: a drill may wait in its queue for hours
_OVER_SECONDS = 30.0  # that a job may be over before its folder says so


def drill(
    recipe_path: Path,
    cluster_path: Path,
    *,
    nodes: int | None = None,
    steps: int = 30,
    out: Path | None = None,
    overrides: list[str] | None = None,
) -> None:
    """Runs the recipe twice for `steps` steps, disturbs the second run twice, and compares every loss.

    A third on the way it is warned as before a time limit, two thirds on all its processes are killed. Both runs log
    each step and save every few; all else that counts is as in the recipe.

    Raises:
        InputError: recipe, data or cluster are wrong, or `out` holds an earlier drill; nothing was started.
        RunError: the second run ended otherwise than the first; what differs is in the message.
    """
    name = load_recipe(recipe_path, overrides).name
    out = (out or Path("runs") / f"drill-{name}").resolve()
    if out.exists():
        raise InputError(
            where=str(out), expected="no earlier drill", found="one", fix="Remove it, or choose another with --out."
        )
    given = [
        *(overrides or []),
        "logging.every_steps=1",
        f"checkpoint={{every_steps: {max(2, steps // 6)}, every_minutes: null}}",
        "evals=[]",
    ]
    alone, disturbed = out / "alone", out / "disturbed"
    for run in (alone, disturbed):
        submit(recipe_path, cluster_path, out=run, nodes=nodes, overrides=given, max_steps=steps)
    try:
        for number, harm in ((1, _warn), (2, _kill)):
            _wait(disturbed, partial(_is_due, disturbed, number * steps // 3))
            harm(disturbed)
            _wait(disturbed, partial(_has_begun, disturbed, number + 1))
        for run in (alone, disturbed):
            _wait(run, partial(_is_over, run))
    except KeyboardInterrupt:
        for run in (alone, disturbed):
            if not _is_over(run):
                cancel(run, now=True)
        raise
    _compare(alone, disturbed, steps)


def _is_over(run: Path) -> bool:
    events = JobFolder(run).events()
    return bool(events) and events[-1]["event"] in ENDINGS


def _has_begun(run: Path, attempts: int) -> bool:
    return JobFolder(run).num_attempts() >= attempts


def _is_due(run: Path, step: int) -> bool:
    """Returns whether a run may be disturbed: it has come to the step, and this attempt has saved a checkpoint, without
    which it would rightly not be queued again.
    """
    folder = JobFolder(run)
    return _step(run) >= step and not folder.attempts_without_checkpoint(str(folder.submitted()["job_id"]))


def _warn(run: Path) -> None:
    job_id = str(JobFolder(run).submitted()["job_id"])
    print(f"step {_step(run)}: job {job_id} is warned as before its time limit", flush=True)
    slurm("scancel", "--signal=USR2", job_id)


def _kill(run: Path) -> None:
    job_id = str(JobFolder(run).submitted()["job_id"])
    print(f"step {_step(run)}: all processes of job {job_id} are killed", flush=True)
    slurm("scancel", "--signal=KILL", f"{job_id}.0")


def _wait(run: Path, condition: Callable[[], bool]) -> None:
    """Waits for a condition; raises RunError where the run, or its job, is over and it will never be met."""
    folder, printed, state, asked, alive = JobFolder(run), "", "", -_ASK_SECONDS, time.monotonic()
    while not condition():
        if _is_over(run) and not condition():
            event = folder.events()[-1]
            raise RunError(
                where=str(run), expected="the drill's run to go on", found=f"{event['event']} {event.get('why', '')}",
                fix=f"See `pretrain logs {run}`; if it was over too soon to be disturbed, give more --steps.",
            )  # fmt: skip
        if time.monotonic() - asked >= _ASK_SECONDS:
            fields, asked = job_fields(str(folder.submitted()["job_id"])) or {}, time.monotonic()
            shorten_requeue_delay(fields)
            state = fields.get("JobState", "unknown")
            alive = asked if state in (*WAITING, *AT_WORK) else alive
            if asked - alive > _OVER_SECONDS:
                raise RunError(
                    where=str(run), expected="its job in SLURM's queue", found=f"job {state.lower()}",
                    fix=f"See `pretrain logs {run}`; see that the cluster queues jobs again (JobRequeue).",
                )  # fmt: skip
        if (line := f"{run.name}: {state.lower()}, step {_step(run)}") != printed:
            print(line, flush=True)
            printed = line
        time.sleep(_POLL_SECONDS)


def _losses(run: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_lines(run / "metrics.jsonl") if "loss" in line}


def _step(run: Path) -> int:
    return max(_losses(run), default=0)


def _compare(alone: Path, disturbed: Path, steps: int) -> None:
    expected, found = _losses(alone), _losses(disturbed)
    differ = [step for step in expected if found.get(step) != expected[step]]
    attempts = JobFolder(disturbed).num_attempts()
    if sorted(expected) != list(range(1, steps + 1)) or sorted(found) != sorted(expected):
        raise RunError(str(disturbed), f"a loss of each of {steps} steps", f"{len(expected)} and {len(found)}")
    if differ:
        apart = max(abs(found[step] - expected[step]) / max(abs(expected[step]), 1e-12) for step in differ)
        raise RunError(
            where=str(disturbed), expected=f"the losses of {alone} to the bit",
            found=f"{len(differ)} of {steps} that differ, the first at step {differ[0]}, by {apart:.1e} at most",
            fix="Kernels that add in no fixed order differ by about 1e-6 a step; more means that something was lost.",
        )  # fmt: skip
    print(f"passed: {steps} losses equal to the bit over {attempts} attempts; both runs are in {alone.parent}")
