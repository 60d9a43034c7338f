"""Where a run's numbers go: `metrics.jsonl`, sinks, the progress line."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

import numpy as np
from numpy.typing import NDArray

from data_pipeline.messages import visible
from pretrain.monitoring.sinks import Sink


class MetricLog:
    """Appends to `metrics.jsonl` and to its sinks, and shows progress; on every rank but 0 it does nothing.

    Args:
        folder: of the run. Lines of steps after `step`, which a resumed run takes again, are dropped.
        step: steps applied so far.
        total_steps: for the progress line.
        active: whether this rank writes.
        sinks: take the same numbers.
    """

    def __init__(self, folder: Path, *, step: int, total_steps: int, active: bool, sinks: Sequence[Sink] = ()) -> None:
        self._active, self._total_steps, self._started_at, self._first_step = (
            active,
            total_steps,
            time.monotonic(),
            step,
        )
        self._live = active and sys.stdout.isatty()
        self._sinks, self._failing = sinks, False
        if not active:
            return
        path = folder / "metrics.jsonl"
        _drop_after(path, step)
        self._file = path.open("a")
        self._text = (folder / "log-rank0.txt").open("a")

    def write(self, step: int, values: dict[str, float]) -> None:
        """Writes one line of `metrics.jsonl`; `values` by name, in the units their names say."""
        if not self._active:
            return
        self._append(self._file, json.dumps({"step": step, **values}))
        for sink in self._sinks:
            sink.write(step, values)

    def picture(self, step: int, name: str, pixels: NDArray[np.uint8]) -> None:
        """Gives an image [H, W, 3] to the sinks."""
        for sink in self._sinks:
            sink.picture(step, name, pixels)

    def progress(self, step: int, values: dict[str, float]) -> None:
        """Shows a logged step: on the live line of a terminal, as a plain line elsewhere."""
        done = step - self._first_step
        left = (time.monotonic() - self._started_at) / max(1, done) * (self._total_steps - step)
        shown = "  ".join(f"{name} {_shown(name, value)}" for name, value in values.items() if name in _SHOWN)
        line = f"step {step}/{self._total_steps}  {shown}  left {_duration(left)}"
        if self._live:
            width = os.get_terminal_size().columns
            sys.stdout.write("\r\x1b[2K" + line[: width - 1])
            sys.stdout.flush()
            self._log(line)
        else:
            self.say(line)

    def say(self, text: str) -> None:
        """Logs a line about what happens once: a checkpoint, an evaluation, a warning."""
        if not self._active:
            return
        text = visible(text, lines=True)
        print(("\r\x1b[2K" if self._live else "") + text, flush=True)
        self._log(text)

    def close(self) -> None:
        if not self._active:
            return
        if self._live:
            print(flush=True)
        self._file.close()
        self._text.close()
        for sink in self._sinks:
            sink.close()

    def _log(self, line: str) -> None:
        if self._active:
            self._append(self._text, line)

    def _append(self, file: TextIO, line: str) -> None:
        """A disk that is full costs lines of the log, not the run."""
        try:
            file.write(line + "\n")
            file.flush()
        except OSError as error:
            if not self._failing:
                print(f"{file.name}: {error.strerror}; the run goes on without", file=sys.stderr, flush=True)
            self._failing = True
        else:
            self._failing = False


_SHOWN = {
    "loss": ".4f",
    "top1": ".3f",
    "probe/top1": ".3f",
    "lr": ".2e",
    "grad_norm": ".3f",
    "images_per_second": ".0f",
    "data_wait": ".1%",
    "mfu": ".1%",
}


def _shown(name: str, value: float) -> str:
    return format(value, _SHOWN[name])


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _drop_after(path: Path, step: int) -> None:
    """A run that was killed has logged steps that its checkpoint does not know, the last line perhaps in part."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except ValueError:
            continue
    part = path.with_suffix(".part")
    part.write_text("".join(kept))
    part.replace(path)
