"""SLURM's commands, as far as they are needed here: what a job is doing, what a partition allows."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta

from data_pipeline.errors import InputError, PretrainError, RunError
from pretrain.runtime.signals import LEAD_SECONDS

_SECONDS = 30
# What variables begin with that another job must not inherit; sbatch's defaults (`SBATCH_ACCOUNT`) are the user's.
_JOB_VARIABLES = (
    "SLURM_",
    "SUBMITIT_",
    "SBATCH_CPU_BIND",
    "SBATCH_MEM_BIND",
    "PRETRAIN_ATTEMPT",
    "PRETRAIN_STARTED",
    LEAD_SECONDS,
)
_CLUSTER_VARIABLES = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SLURM_JWT")  # where it is, and a key to it

# Words of squeue and sacct for what a job is doing; any other word is how it ended.
WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD")
HELD = "JobHeldUser"  # why a job waits that was queued held, or is held by its user
_STATE = re.compile(r"[A-Z][A-Z_]+(?=\s|\+|\Z)")
AT_WORK = ("RUNNING", "COMPLETING", "RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED", "SUSPENDED")


def slurm(*words: str, seconds: float = _SECONDS, given: str | None = None) -> str:
    """Runs a command of SLURM's and returns its output.

    Args:
        words: the command and its arguments.
        seconds: that it may take.
        given: what it reads from stdin.

    Raises:
        InputError: there is no such command here.
        RunError: the command failed, or did not answer in time.
    """
    try:
        done = subprocess.run(
            words, input=given, capture_output=True, encoding="utf-8", errors="replace", timeout=seconds, env=outside()
        )
    except FileNotFoundError:
        raise InputError(
            where=words[0], expected="SLURM's commands on this machine", found="no such command",
            fix="Log in to a node of the cluster, or use --local.",
        ) from None  # fmt: skip
    except subprocess.TimeoutExpired:
        raise RunError(words[0], f"an answer within {seconds:g} s", "none", "See whether slurmctld is up.") from None
    except OSError as error:
        raise RunError(
            words[0], "a command that can be run", error.strerror or str(error), "See `which` it is."
        ) from None
    if done.returncode:
        found = (done.stderr or done.stdout).strip()
        raise RunError(where=" ".join(words[:3]), expected="SLURM to do it", found=found)
    return done.stdout


def outside() -> dict[str, str]:
    """Returns the environment without the variables of a job around this process, as in `salloc` or a job's agent:
    sbatch would take its memory, its number of CPUs and their binding for those of the new job.
    """
    return {k: v for k, v in os.environ.items() if k in _CLUSTER_VARIABLES or not k.startswith(_JOB_VARIABLES)}


@contextmanager
def from_outside() -> Iterator[None]:
    """Gives this process that environment for a block: submitit has no other way to be told."""
    before = dict(os.environ)
    for name in before.keys() - outside().keys():
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(before)


def parse_fields(text: str) -> dict[str, str]:
    """Returns the `Key=Value` words of a line that scontrol prints with -o."""
    return dict(word.split("=", 1) for word in text.split() if "=" in word)


def job_fields(job_id: str) -> Mapping[str, str] | None:
    """Returns what SLURM knows about a job; None: it has forgotten the job, or never knew it."""
    try:
        return parse_fields(slurm("scontrol", "show", "job", "-o", job_id))
    except RunError as error:
        if "Invalid job id" in error.found:
            return None
        raise


def job_comment(job_id: str) -> str:
    """Returns the comment on a job, as long as SLURM or its accounts keep it; empty: there is none."""
    with suppress(PretrainError):
        said = slurm("scontrol", "show", "job", job_id, seconds=10)
        if (match := re.search(r"^\s*Comment=(.*)$", said, re.MULTILINE)) is not None:
            return match[1].strip()
    with suppress(PretrainError):
        words = ("--noheader", "--parsable2", "--allocations", f"--jobs={job_id}", "--format=Comment")
        return slurm("sacct", *words, seconds=10).strip()
    return ""


def job_states(job_ids: Iterable[str]) -> dict[str, str] | None:
    """Returns SLURM's word for the state of each job that it still knows; None: SLURM does not answer."""
    ids = sorted(set(job_ids))
    if not ids:
        return {}
    try:
        said = slurm("squeue", "--noheader", "--states=all", f"--jobs={','.join(ids)}", "--format=%i %T", seconds=10)
        states = _by_id(said, " ", ids)
    except PretrainError as error:
        if "Invalid job id" not in error.found:  # what it says of a single one that is long over
            return None
        states = {}
    if unknown := [job_id for job_id in ids if job_id not in states]:
        words = ("--noheader", "--parsable2", "--allocations", f"--jobs={','.join(unknown)}", "--format=JobIDRaw,State")
        with suppress(PretrainError):  # accounts are not kept everywhere
            states |= _by_id(slurm("sacct", *words, seconds=10), "|", unknown)
    return states


def _by_id(text: str, separator: str, ids: Collection[str]) -> dict[str, str]:
    """Returns the first word of each of these jobs' states, of lines that hold one: sacct says `CANCELLED by 1000`."""
    pairs = (line.strip().partition(separator) for line in text.splitlines())
    return {job_id: word[0] for job_id, _, state in pairs if job_id in ids and (word := _STATE.match(state.strip()))}


def kill_wait_seconds() -> float:
    """Returns the seconds between the signal at which a job may end by itself and SIGKILL to all of it; SLURM's default
    where it does not say.
    """
    match = None
    with suppress(PretrainError):
        match = re.search(r"^KillWait\s*=\s*(\d+)", slurm("scontrol", "show", "config"), re.MULTILINE)
    return float(match[1]) if match else 30.0


def shorten_requeue_delay(fields: Mapping[str, str]) -> None:
    """Lets a job that was queued again start in seconds, where SLURM makes it wait for two minutes.

    Not at once: nodes have just revoked its credential, and one of the same second would count as that one.
    """
    begin = fields.get("EligibleTime", "Unknown") if fields.get("Reason") == "BeginTime" else "Unknown"
    try:
        waits = datetime.fromisoformat(begin) - datetime.now() > timedelta(seconds=15)
    except ValueError:  # Unknown, or another word
        return
    if waits:
        slurm("scontrol", "update", f"JobId={fields['JobId']}", "StartTime=now+5")


def partitions() -> dict[str, dict[str, str]]:
    """Returns what SLURM knows about each partition, by name."""
    found = [
        parse_fields(line)
        for line in slurm("scontrol", "--all", "show", "partition", "-o").splitlines()
        if line.strip()
    ]
    return {fields["PartitionName"]: fields for fields in found if "PartitionName" in fields}


def parse_minutes(limit: str) -> float | None:
    """Returns the minutes of a time limit as SLURM writes it (`1-00:30:00`, `30:00`); None: there is no limit."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", limit)
    if match is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return days * 1440 + hours * 60 + minutes + seconds / 60
