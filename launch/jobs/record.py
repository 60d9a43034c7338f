"""The jobs that a run was submitted as, read from its folder; a run that was never submitted has none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from launch.jobs.folder import JobFolder

# Events after which nobody starts a run again, and the state that it is in then; as SLURM spells them.
ENDINGS: Mapping[str, Literal["done", "stopped", "cancelled"]] = {
    "done": "done",
    "stop": "stopped",
    "cancel": "cancelled",
}


@dataclass(frozen=True)
class JobRecord:
    """The latest submission, and every event since the first.

    Attributes:
        submitted: job/submitted.json.
        events: job/attempts.jsonl, in its order.
        unwanted: `pretrain cancel` was called since.
    """

    submitted: Mapping[str, Any]
    events: tuple[Mapping[str, Any], ...]
    unwanted: bool = False

    @property
    def job_id(self) -> str | None:
        """The job's number; None: SLURM has not taken the job yet."""
        job_id: str | None = self.submitted["job_id"]
        return job_id

    @property
    def released(self) -> bool:
        """Whether its job may start. It is queued held, and released once its number is written down; a submission
        that was killed in between leaves it held. Earlier code held none.
        """
        return bool(self.submitted.get("released", self.job_id is not None)) or self.started

    @property
    def is_local(self) -> bool:
        return bool(self.submitted.get("executor") == "local")

    @property
    def current(self) -> tuple[Mapping[str, Any], ...]:
        """The events of the latest submission: of its job, as an earlier one may still write its last word, such as
        that it was not for it. Events of earlier code have no number of a job: those after the job's first start,
        or, as a job that was canceled before it started has none, after it was submitted.
        """
        starts = [i for i, e in enumerate(self.events) if e["event"] == "start" and e["job_id"] == self.job_id]
        events = self.events[starts[0] :] if starts else self.events
        late = self.submitted["submitted_at"] if not starts else 0.0
        return tuple(
            event for event in events
            if (event["job_id"] == self.job_id if "job_id" in event else event["at"] >= late)
        )  # fmt: skip

    @property
    def started(self) -> bool:
        return any(event["event"] == "start" for event in self.current)

    @property
    def ending(self) -> Mapping[str, Any] | None:
        """The event that ended the run for good; None: there was none, however its job ended."""
        return next((event for event in self.current if event["event"] in ENDINGS), None)

    @property
    def requeues(self) -> int:
        """The number of starts that no submission asked for, those included that SLURM made without an event."""
        started = [event["job_id"] for event in self.events if event["event"] == "start"]
        return len(started) - len(set(started))


def load_job(run: Path) -> JobRecord | None:
    """Reads the record of a run's jobs; None: the run was never submitted."""
    folder = JobFolder(run)
    if not (folder.path / "submitted.json").is_file():
        return None
    return JobRecord(folder.submitted(), tuple(folder.events()), folder.canceled.exists())
