"""Runs an evaluation, over its ranks where it has several, and keeps its report."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import nullcontext
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import typer

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
        words = ["eval", str(context.command.name), *words_of(context.command, shared)]
        status = launch(words, num_ranks, module="launch.cli")
    raise typer.Exit(status)


def words_of(command: Any, values: Mapping[str, Any]) -> list[str]:
    """The words of a command line that give these values to the parameters of a click command."""
    positional: list[str] = []
    words: list[str] = []
    for parameter in command.params:
        value = values.get(str(parameter.name))
        given = list(map(str, value)) if isinstance(value, list | tuple) else [str(value)]
        if value is None:
            continue
        if parameter.param_type_name == "argument":
            positional += given
        elif isinstance(value, bool):
            words += parameter.opts[:1] if value else parameter.secondary_opts[:1]
        elif parameter.multiple:
            words += [word for text in given for word in (parameter.opts[0], text)]
        else:
            words += [parameter.opts[0], *given]
    return [*words, "--", *positional]


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

    from rich.console import Console
    from rich.table import Table

    plain = {name: str(v) if isinstance(v, (Path, Enum)) else v for name, v in context.params.items()}
    report = replace(report, arguments={"command": f"eval {report.evaluator}", **plain})
    path = out or (run / "evals" / report.file_name if run else None)
    if path is not None:
        report.save(path)
    console = Console(soft_wrap=True)
    table = Table("metric", "%", "n", title=f"{report.evaluator}: {called(report)}", title_justify="left")
    for name, value in report.metrics.items():
        table.add_row(name, f"{value:.2f}", str(report.n), style="bold" if name == report.metric else None)
    console.print(table)
    for note in report.notes:
        console.print(f"note: {note}")
    console.print(f"report: {path}" if path else "not kept: name a file with --out FILE.json")


def called(report: EvalReport) -> str:
    return f"{report.encoder['source']} ({report.encoder['tag']})"
