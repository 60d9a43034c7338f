"""What is kept of a run's jobs, in `RUN/job`: what was submitted, and what became of each attempt. Imports no torch."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.durable import durable_file
from data_pipeline.errors import InputError
from pretrain.strict_yaml import read_yaml


@dataclass(frozen=True)
class JobFolder:
    """Of the run in `run`."""

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
    def cancelled(self) -> Path:
        """Stands there where the user wants no more of the run."""
        return self.path / "cancelled"

    def submitted(self) -> Mapping[str, Any]:
        """What `pretrain submit` wrote last.

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
        self.path.mkdir(parents=True, exist_ok=True)
        with durable_file(self.path / name) as file:
            file.write(text.encode())

    def note(self, event: str, **values: Any) -> None:
        """Appends a line to `attempts.jsonl`; one process at a time writes there."""
        line = json.dumps({"event": event, "at": time.time(), **values})
        with (self.path / "attempts.jsonl").open("ab") as file:
            file.write(line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def events(self) -> list[dict[str, Any]]:
        """All lines of `attempts.jsonl`; one that a kill cut short is passed over."""
        try:
            lines = (self.path / "attempts.jsonl").read_bytes().split(b"\n")
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in lines if line.endswith(b"}")]

    def num_attempts(self) -> int:
        return sum(event["event"] == "start" for event in self.events())

    def newest_step(self) -> int:
        """Of the newest complete checkpoint; 0: there is none."""
        steps = (int(path.parent.name.removeprefix("step_")) for path in self.run.glob("checkpoints/step_*/COMPLETE"))
        return max(steps, default=0)

    def total_steps(self) -> int | None:
        """As `resolved.yaml` says; None: the run never started."""
        try:
            tree, _ = read_yaml((self.run / "resolved.yaml").read_text())
        except FileNotFoundError:
            return None
        return int(tree["resolved"]["total_steps"])
