"""Waiting in tests: for a condition, with a deadline; and runs that wait in turn until a test has done its part."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.loader import StepData, TrainLoader

AT_THE_START = """\
import os, pathlib, sys

class BeforeTheRun:
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name == "pretrain.run":
            sys.meta_path.remove(cls)
            from tests.gate import Gate

            Gate(pathlib.Path(os.environ["GATE"])).hold()

sys.meta_path.insert(0, BeforeTheRun)
"""


def until(
    condition: Callable[[], object],
    *,
    meanwhile: Callable[[], object] = lambda: True,
    said: Callable[[], object] = lambda: "",
    seconds: float = 300.0,
) -> None:
    """Returns once `condition()` is true.

    Raises:
        AssertionError: with `said()`, where so many seconds have passed, or `meanwhile()` is false no less than that.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        assert meanwhile() or condition(), f"it ended before: {said()}"
        assert time.monotonic() < deadline, f"not within {seconds} s: {said()}"
        time.sleep(0.005)


@dataclass(frozen=True)
class Gate:
    """A file with the number of the last step that a run may take; the run waits before the one after it."""

    path: Path

    def open(self, last_step: int) -> None:
        part = self.path.with_suffix(".part")
        part.write_text(str(last_step))
        part.replace(self.path)

    def in_front_of(self, folder: Path) -> dict[str, str]:
        """Variables of the environment in which any Python process, however it is started, trains behind this gate.

        A file goes into the folder, which Python runs as it begins.
        """
        (folder / "sitecustomize.py").write_text(AT_THE_START)
        return {"PYTHONPATH": f"{folder}:{Path(__file__).parents[1]}", "GATE": str(self.path)}

    def hold(self) -> None:
        """From now on every loader of this process gives a batch only when the gate is open for its step."""
        steps = TrainLoader.steps

        def held(loader: TrainLoader, cursor: int) -> Iterator[StepData]:
            size = None
            for data in steps(loader, cursor):
                size = size or data.cursor - cursor
                step = data.cursor // size
                until(lambda step=step: step <= int(self.path.read_text()), seconds=900)  # type: ignore[misc]
                yield data

        TrainLoader.steps = held  # type: ignore[method-assign]


def behind(gate: Gate, function: Callable[[], object]) -> None:
    """Calls a function in a process that trains behind the gate, with all that is forked from it."""
    gate.hold()
    function()
