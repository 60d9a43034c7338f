"""Runs an evaluation, over its ranks where it has several, and keeps its report."""

from __future__ import annotations

import os
from contextlib import nullcontext
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

import typer

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


def judge(evaluator: Judge[T], judged: T, out: Path | None, context: typer.Context) -> None:
    """Runs an evaluation, with the other ranks where there are any; the first keeps the report."""
    from pretrain.runtime.collectives import World, process_group

    world = World.from_environment()
    with process_group(world, judged.device) if world.size > 1 else nullcontext():
        report = evaluator.run(judged)
    if world.is_main:
        keep(report, judged.run, out, context)


def keep(report: EvalReport, run: Path | None, out: Path | None, context: typer.Context) -> None:
    """Writes the report where it belongs, and prints what it says."""
    from dataclasses import replace

    from rich.table import Table

    from launch.terminal import columns, terminal

    plain = {name: str(v) if isinstance(v, (Path, Enum)) else v for name, v in context.params.items()}
    report = replace(report, arguments={"command": f"eval {report.evaluator}", **plain})
    path = out or (run / "evals" / report.file_name if run else None)
    if path is not None:
        report.save(path)
    console = terminal()
    table = Table(
        *columns("metric", "%", "n"), title=f"{report.evaluator}: {result_label(report)}", title_justify="left"
    )
    for name, value in report.metrics.items():
        table.add_row(name, f"{value:.2f}", str(report.n), style="bold" if name == report.metric else None)
    console.print(table)
    for note in report.notes:
        console.print(f"note: {note}")
    console.print(f"report: {path}" if path else "not kept: name a file with --out FILE.json")


def result_label(report: EvalReport) -> str:
    return f"{report.encoder['source']} ({report.encoder['tag']})"
