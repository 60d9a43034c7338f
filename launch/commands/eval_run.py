"""Runs an evaluation, over its ranks where it has several, and keeps its report."""

from __future__ import annotations

import os
from contextlib import nullcontext
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

import typer

from data_pipeline.durable import check_writable
from data_pipeline.errors import RunError
from launch.suites.words import command_words

if TYPE_CHECKING:
    import torch

    from pretrain.evals.result import EvalReport


class OnDevice(Protocol):
    """An encoder, or two towers."""

    @property
    def device(self) -> torch.device: ...
    @property
    def run(self) -> Path | None: ...


T = TypeVar("T", bound=OnDevice)
T_contra = TypeVar("T_contra", bound=OnDevice, contravariant=True)


class Judge(Protocol[T_contra]):
    def run(self, judged: T_contra, /) -> EvalReport: ...


def over_ranks(context: typer.Context, num_ranks: int, cache: Path | None) -> None:
    """Starts the same command once for each rank and exits with their status, unless this is one of them already."""
    if num_ranks == 1 or "RANK" in os.environ:
        return
    from tempfile import TemporaryDirectory

    from launch.ranks.launcher import launch

    with TemporaryDirectory(prefix="pretrain-features-") as folder:
        shared = {**context.params, "cache": cache or folder}
        words = ["eval", str(context.command.name), *command_words(context.command, shared)]
        status = launch(words, num_ranks, module="launch.cli")
    raise typer.Exit(status)


def check_place(report: Path) -> None:
    """Raises InputError where a report, or the outcomes beside it, could not be written."""
    for path in (report, report.with_suffix(".safetensors")):
        check_writable(path, "the report", "Name another file with --out FILE.json, or make room.")


def check_report(run: Path | None, out: Path | None) -> None:
    """Raises InputError where the report of what is going to be judged could not be written; before it is judged."""
    if out is not None or run is not None:
        check_place(out or run / "evals" / "report.json")  # type: ignore[operator]


def judge(evaluator: Judge[T], judged: T, out: Path | None, context: typer.Context) -> None:
    """Runs an evaluation, with the other ranks where there are any; the first keeps the report."""
    from pretrain.runtime.collectives import World, process_group

    world = World.from_environment()
    if world.is_main:
        check_report(judged.run, out)
    with process_group(world, judged.device) if world.size > 1 else nullcontext():
        report = evaluator.run(judged)
    if world.is_main:
        keep(report, judged.run, out, context)


def keep(report: EvalReport, run: Path | None, out: Path | None, context: typer.Context) -> None:
    """Writes the report where it belongs, and prints what it says, also where it cannot be written.

    Raises:
        RunError: it cannot be written.
    """
    from dataclasses import replace

    plain = {name: str(v) if isinstance(v, (Path, Enum)) else v for name, v in context.params.items()}
    report = replace(report, arguments={"command": f"eval {report.evaluator}", **plain})
    path = out or (run / "evals" / report.file_name if run else None)
    failure: OSError | None = None
    try:
        if path is not None:
            report.save(path)
    except OSError as error:
        failure = error
    print_report(report)
    if failure is not None:
        raise RunError(
            where=str(path), expected="a place where the report can be written", found=failure.strerror or str(failure),
            fix="The numbers above hold, but their report is lost. Make room, or name another file with --out, and ask "
            "again; with --cache the features are there.",
        ) from failure  # fmt: skip
    print(f"report: {path}" if path else "not kept: name a file with --out FILE.json")


def print_report(report: EvalReport) -> None:
    """A table of what was measured, the metric that counts first, each with chance and 95 % interval; and the notes."""
    from rich.table import Table

    from launch.terminal import chance_text, columns, interval_text, terminal

    console = terminal()
    names = columns("metric", "%", "95 % interval", "chance", "n")
    table = Table(*names, title=f"{report.evaluator}: {result_label(report)}", title_justify="left")
    for name, value in sorted(report.metrics.items(), key=lambda metric: metric[0] != report.metric):
        told = (interval_text(report, name), chance_text(report, name), str(report.n))
        table.add_row(name, f"{value:.2f}", *told, style="bold" if name == report.metric else None)
    console.print(table)
    if report.intervals:
        console.print(f"95 % intervals are over {report.interval_over}; chance is what guessing gives.")
    for note in report.notes:
        console.print(f"note: {note}")


def result_label(report: EvalReport) -> str:
    return f"{report.encoder['source']} ({report.encoder['tag']})"
