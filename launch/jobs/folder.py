"""The record of a run's jobs in `RUN/job`: what was submitted, and how each attempt ended. Imports no torch."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from data_pipeline.durable import append_line, read_lines, write_text
from data_pipeline.errors import InputError
from pretrain.runtime.run_folder import newest_checkpoint, step_of


@dataclass(frozen=True)
class JobFolder:
    """The folder `job` of a run."""

    run: Path

    @property
    def path(self) -> Path:
        return self.run / "job"

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def cluster(self) -> Path:
        return self.path / "cluster.yaml"

    @property
    def logs(self) -> Path:
        return self.path / "slurm"

    @property
    def canceled(self) -> Path:
        """The file that is there when the user wants no more of the run. Jobs of earlier code look for that name."""
        return self.path / "cancelled"

    def submitted(self) -> Mapping[str, Any]:
        """Returns what was written by the last submission.

        Raises:
            InputError: nothing was submitted from here.
        """
        try:
            return dict(json.loads((self.path / "submitted.json").read_bytes()))
        except FileNotFoundError:
            raise InputError(
                where=str(self.run), expected="a run that was submitted", found="no job/submitted.json in it",
                fix="Give the folder that `pretrain submit` printed.",
            ) from None  # fmt: skip

    def write(self, name: str, text: str) -> None:
        write_text(self.path / name, text)

    def note(self, event: str, **values: Any) -> None:
        """Appends a line to `attempts.jsonl`; one process at a time writes there."""
        append_line(self.path / "attempts.jsonl", {"event": event, "at": time.time(), **values}, durable=True)

    def events(self) -> list[dict[str, Any]]:
        """Returns all lines of `attempts.jsonl`; one that a kill cut short is passed over."""
        return read_lines(self.path / "attempts.jsonl")

    def num_attempts(self) -> int:
        return sum(event["event"] == "start" for event in self.events())

    def starts(self, job_id: str) -> list[dict[str, Any]]:
        """Returns the starts of a job's attempts; those of an earlier submission do not count."""
        return [event for event in self.events() if event["event"] == "start" and event.get("job_id") == job_id]

    def attempts_without_checkpoint(self, job_id: str) -> int:
        """Returns how many of a job's last attempts began with the newest checkpoint that there is now."""
        step = self.newest_step()
        return len(list(takewhile(lambda start: start["step"] >= step, reversed(self.starts(job_id)))))

    def newest_step(self) -> int:
        """Returns the step of the newest complete checkpoint; 0: there is none."""
        newest = newest_checkpoint(self.run)
        return step_of(newest) if newest is not None else 0
