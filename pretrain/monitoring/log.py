"""Where a run's numbers and words go: `metrics.jsonl`, `log-rank0.txt`, the terminal, and the sinks of its recipe."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.durable import append_line, durable_file
from data_pipeline.messages import visible
from pretrain.monitoring.outlets import AppendedFile, Outlet, write_stderr, write_stdout
from pretrain.monitoring.sinks import Sink


class MetricLog:
    """Appends to `metrics.jsonl` and to its sinks, and shows progress; on every rank but 0 it does nothing.

    Args:
        folder: of the run. Lines of steps after `step`, which a resumed run takes again, are dropped.
        step: steps applied so far.
        total_steps: for the progress line.
        active: whether this rank writes.
        sinks: take the same numbers, by their names in messages.
    """

    def __init__(
        self,
        folder: Path,
        *,
        step: int,
        total_steps: int,
        active: bool,
        sinks: Mapping[str, Sink] | None = None,
    ) -> None:
        self._active, self._total_steps, self._first_step = active, total_steps, step
        self._started_at = time.monotonic()
        self._live = active and sys.stdout.isatty()
        self._numbers, self._text = (Outlet(name, self._tell) for name in ("metrics.jsonl", "log-rank0.txt"))
        self._shown, self._unwritten = Outlet("stdout", self._tell), 0
        foreign = (Exception,)  # whatever a library raises
        self._sinks = [(Outlet(name, self._tell, foreign), sink) for name, sink in (sinks or {}).items()]
        if not active:
            return
        _drop_after(folder / "metrics.jsonl", step)
        self._numbers_file, self._text_file = AppendedFile(folder / "metrics.jsonl"), AppendedFile(folder / LOG)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Writes one line of `metrics.jsonl`; `values` by name, in the units their names say."""
        if not self._active:
            return
        self._numbers.give(lambda: self._numbers_file.write_line(json.dumps({"step": step, **values})))
        for outlet, sink in self._sinks:
            outlet.give(lambda sink=sink: sink.write(step, values))  # type: ignore[misc]

    def picture(self, step: int, name: str, pixels: NDArray[np.uint8]) -> None:
        """Gives an image [H, W, 3] to the sinks."""
        for outlet, sink in self._sinks:
            outlet.give(lambda sink=sink: sink.picture(step, name, pixels))  # type: ignore[misc]

    def keep(self, what: str, write: Callable[[], object]) -> bool:
        """Writes something that is beside the run (a report, a picture, a trace), by calling `write`.

        Args:
            what: the file, for the sentence that says that it could not be written.
            write: writes it.

        Returns:
            Whether it was written.
        """
        written = Outlet(what, self._tell).give(write)
        self._unwritten += not written
        return written

    def append(self, path: Path, record: Mapping[str, Any]) -> None:
        """Appends a line to another file of the run's folder."""
        if self._active:
            self.keep(str(path), lambda: append_line(path, record))

    def progress(self, step: int, values: dict[str, float]) -> None:
        """Shows a logged step: on the live line of a terminal, as a plain line elsewhere."""
        done = step - self._first_step
        left = (time.monotonic() - self._started_at) / max(1, done) * (self._total_steps - step)
        line = progress_line(step, self._total_steps, left, values)
        if self._live:
            self._shown.give(lambda: write_stdout(f"\r\x1b[2K{line[: os.get_terminal_size().columns - 1]}"))
            self._log(line)
        else:
            self.say(line)

    def say(self, text: str) -> None:
        """Logs a line about what happens once: a checkpoint, an evaluation, a warning."""
        if not self._active:
            return
        text = visible(text, lines=True)
        self._shown.give(lambda: write_stdout(("\r\x1b[2K" if self._live else "") + text + "\n"))
        self._log(text)

    def close(self) -> None:
        """Says what was lost on the way, and closes everything."""
        if not self._active:
            return
        for outlet, sink in self._sinks:
            outlet.end(sink.close)
        if self._live:
            self._shown.give(lambda: write_stdout("\n"))
        for outlet in (self._numbers, self._text, self._shown, *(outlet for outlet, _ in self._sinks)):
            if outlet.lost:
                self._tell(f"{outlet.name}: {outlet.loss()} in all")
        if self._unwritten:
            self._tell(f"files beside the run: {self._unwritten} not written")
        for outlet, file in ((self._numbers, self._numbers_file), (self._text, self._text_file)):
            outlet.end(file.close)

    def _log(self, line: str) -> None:
        if self._active:
            self._text.give(lambda: self._text_file.write_line(line))

    def _tell(self, text: str) -> None:
        """Says what became of an outlet: on stderr too, as stdout may be the one."""
        write_stderr(text)
        self.say(text)


LOG = "log-rank0.txt"
_SHOWN = {
    "top1": ".1%",
    "probe/top1": ".1%",
    "lr": ".2e",
    "grad_norm": ".3f",
    "data_wait": ".1%",
    "mfu": ".1%",
}


def progress_line(step: int, total_steps: int, left_seconds: float, values: Mapping[str, float]) -> str:
    """A logged step in a line, the most wanted first: a terminal may cut the rest."""
    parts = [f"step {step}/{total_steps}"]
    parts += [f"loss {values['loss']:.4f}"] if "loss" in values else []
    parts += [f"left {_duration(left_seconds)}"]
    parts += [f"{values['images_per_second']:.0f} images/s"] if "images_per_second" in values else []
    parts += [f"{name} {values[name]:{form}}" for name, form in _SHOWN.items() if name in values]
    return "  ".join(parts)


def evaluation_line(step: int, values: Mapping[str, float]) -> str:
    """An evaluation as a line of the log: accuracies in percent, with the sign, whoever measured them.

    Args:
        step: steps applied.
        values: by name. The validation set's, `val/...`, are losses and shares; those of protocols are percent;
            `.../left_out` counts samples.
    """
    return "  ".join([f"step {step}", *(f"{name} {evaluated(name, value)}" for name, value in values.items())])


def evaluated(name: str, value: float) -> str:
    """What an evaluation found, as `evaluation_line` shows it."""
    if name.endswith("/left_out"):
        return f"{value:.0f}"
    if not name.startswith("val/"):
        return f"{value:.2f}%"
    is_share = re.search(r"(^|[/_])(top\d+|accuracy|\w+_to_\w+)", name)
    return f"{value:.2%}" if is_share else f"{value:.4f}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _drop_after(path: Path, step: int) -> None:
    """A run that was killed has logged steps that its checkpoint does not know, the last line perhaps in part."""
    if not path.exists():
        return
    text = path.read_text("utf-8", "replace")
    kept = []
    for line in text.splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except ValueError:
            continue
    if (left := "".join(kept)) != text:
        with durable_file(path) as file:
            file.write(left.encode())
