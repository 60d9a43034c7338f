"""SLURM's commands, as far as they are needed here: what a job is doing, what a partition allows."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta

from data_pipeline.errors import InputError, PretrainError, RunError
from pretrain.runtime.signals import LEAD_SECONDS

_SECONDS = 30
# What variables begin with that another job must not inherit; sbatch's defaults (`SBATCH_ACCOUNT`) are the user's.
_OF_A_JOB = (
    "SLURM_",
    "SUBMITIT_",
    "SBATCH_CPU_BIND",
    "SBATCH_MEM_BIND",
    "PRETRAIN_ATTEMPT",
    "PRETRAIN_STARTED",
    LEAD_SECONDS,
)
_OF_THE_CLUSTER = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SLURM_JWT")  # where it is, and a key to it

# Words of squeue and sacct for what a job is doing; any other word is how it ended.
WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD")
AT_WORK = ("RUNNING", "COMPLETING", "RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED", "SUSPENDED")


def slurm(*words: str, seconds: float = _SECONDS, given: str | None = None) -> str:
    """Output of a command, which reads `given`.

    Raises:
        InputError: there is no such command here.
        RunError: it failed, or does not answer.
    """
    try:
        done = subprocess.run(words, input=given, capture_output=True, text=True, timeout=seconds, env=outside())
    except FileNotFoundError:
        raise InputError(
            where=words[0], expected="SLURM's commands on this machine", found="no such command",
            fix="Log in to a node of the cluster, or use --local.",
        ) from None  # fmt: skip
    except subprocess.TimeoutExpired:
        raise RunError(words[0], f"an answer within {seconds:g} s", "none", "See whether slurmctld is up.") from None
    if done.returncode:
        found = (done.stderr or done.stdout).strip()
        raise RunError(where=" ".join(words[:3]), expected="SLURM to do it", found=found)
    return done.stdout


def outside() -> dict[str, str]:
    """The environment without what a job around it says, as in `salloc` or a job's agent: sbatch would take its memory,
    its number of CPUs and their binding for what the new job asks.
    """
    return {k: v for k, v in os.environ.items() if k in _OF_THE_CLUSTER or not k.startswith(_OF_A_JOB)}


@contextmanager
def from_outside() -> Iterator[None]:
    """Within, this process has that environment: submitit has no other way to be told."""
    before = dict(os.environ)
    for name in before.keys() - outside().keys():
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(before)


def fields_of(text: str) -> dict[str, str]:
    """`Key=Value` words of what scontrol says with -o."""
    return dict(word.split("=", 1) for word in text.split() if "=" in word)


def job_fields(job_id: str) -> Mapping[str, str] | None:
    """What is known of a job; None: SLURM has forgotten it, or never knew it."""
    try:
        return fields_of(slurm("scontrol", "show", "job", "-o", job_id))
    except RunError as error:
        if "Invalid job id" in error.found:
            return None
        raise


def job_states(job_ids: Iterable[str]) -> dict[str, str] | None:
    """SLURM's word for the state of each job, as far as it still knows it; None where it does not answer."""
    ids = sorted(set(job_ids))
    if not ids:
        return {}
    try:
        said = slurm("squeue", "--noheader", "--states=all", f"--jobs={','.join(ids)}", "--format=%i %T", seconds=10)
        states = _by_id(said, " ")
    except PretrainError as error:
        if "Invalid job id" not in error.found:  # what it says of a single one that is long over
            return None
        states = {}
    if unknown := [job_id for job_id in ids if job_id not in states]:
        words = ("--noheader", "--parsable2", "--allocations", f"--jobs={','.join(unknown)}", "--format=JobIDRaw,State")
        with suppress(PretrainError):  # accounts are not kept everywhere
            states |= _by_id(slurm("sacct", *words, seconds=10), "|")
    return states


def _by_id(text: str, separator: str) -> dict[str, str]:
    """The first word of the state: sacct says `CANCELLED by 1000`."""
    pairs = (line.strip().partition(separator) for line in text.splitlines())
    return {job_id: state.split()[0] for job_id, _, state in pairs if state.split()}


def kill_wait_seconds() -> float:
    """Between the signal at which a job that has to end may end by itself, and SIGKILL to all of it; where SLURM does
    not say, its default.
    """
    match = None
    with suppress(PretrainError):
        match = re.search(r"^KillWait\s*=\s*(\d+)", slurm("scontrol", "show", "config"), re.MULTILINE)
    return float(match[1]) if match else 30.0


def hurry(fields: Mapping[str, str]) -> None:
    """Lets a job that was queued again start in seconds, where SLURM makes it wait for two minutes.

    Not at once: nodes have just revoked its credential, and one of the same second would count as that one.
    """
    begin = fields.get("EligibleTime", "Unknown") if fields.get("Reason") == "BeginTime" else "Unknown"
    if begin != "Unknown" and datetime.fromisoformat(begin) - datetime.now() > timedelta(seconds=15):
        slurm("scontrol", "update", f"JobId={fields['JobId']}", "StartTime=now+5")


def partitions() -> dict[str, dict[str, str]]:
    """What is known of each partition, by name."""
    found = [
        fields_of(line) for line in slurm("scontrol", "--all", "show", "partition", "-o").splitlines() if line.strip()
    ]
    return {fields["PartitionName"]: fields for fields in found if "PartitionName" in fields}


def minutes_of(limit: str) -> float | None:
    """A time limit as SLURM writes it (`1-00:30:00`, `30:00`); None: there is none."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", limit)
    if match is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return days * 1440 + hours * 60 + minutes + seconds / 60
