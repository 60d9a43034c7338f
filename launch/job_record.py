"""What a run's folder tells of the jobs that it was submitted as; a run that was never submitted has none."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data_pipeline.errors import RunError

# Events after which nobody starts it again, and the state that it is in then.
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
    """

    submitted: Mapping[str, Any]
    events: tuple[Mapping[str, Any], ...]

    @property
    def job_id(self) -> str:
        return str(self.submitted["job_id"])

    @property
    def is_local(self) -> bool:
        return bool(self.submitted.get("executor") == "local")

    @property
    def current(self) -> tuple[Mapping[str, Any], ...]:
        """The events of the latest submission. Clocks of two machines may differ, so its job's first start goes
        before the time; a job that was cancelled before it started has only that.
        """
        own = [i for i, e in enumerate(self.events) if e["event"] == "start" and str(e["job_id"]) == self.job_id]
        if own:
            return self.events[own[0] :]
        return tuple(event for event in self.events if event["at"] >= self.submitted["submitted_at"])

    @property
    def started(self) -> bool:
        return any(event["event"] == "start" for event in self.current)

    @property
    def ending(self) -> Mapping[str, Any] | None:
        """The event that ended it for good; None: there was none, whatever became of its job."""
        return next((event for event in self.current if event["event"] in ENDINGS), None)

    @property
    def requeues(self) -> int:
        """Starts that no submission asked for: also those that SLURM saw to by itself, which are no events."""
        started = [str(event["job_id"]) for event in self.events if event["event"] == "start"]
        return len(started) - len(set(started))


def load_job(run: Path) -> JobRecord | None:
    """None where the run was never submitted.

    Raises:
        RunError: submitted.json is not what submitting writes.
    """
    path = run / "job" / "submitted.json"
    try:
        submitted = json.loads(path.read_bytes())
        if not {"job_id", "submitted_at"} <= submitted.keys():
            raise ValueError("no job_id or submitted_at in it")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError) as error:
        raise RunError(
            where=str(path), expected="what `pretrain submit` writes", found=str(error), fix="Submit the run again."
        ) from None
    return JobRecord(submitted, tuple(_events(run / "job" / "attempts.jsonl")))


def _events(path: Path) -> list[Mapping[str, Any]]:
    """Whole lines only: the last may be half written."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return []
    events: list[Mapping[str, Any]] = []
    for line in lines:
        try:
            event = json.loads(line)
            if isinstance(event, dict) and "at" in event and (event["event"] != "start" or "job_id" in event):
                events.append(event)
        except (ValueError, KeyError):
            continue
    return events
