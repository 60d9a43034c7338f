"""`pretrain eval suite`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def suite(
    context: typer.Context,
    suite_path: Annotated[Path, typer.Argument(metavar="FILE", help="A suite, such as configs/suites/*.yaml.")],
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Its folder [runs/<its name>].")] = None,
    cluster: Annotated[
        Path | None, typer.Option("--cluster", metavar="FILE", help="Queues a job there for each result.")
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Prints the commands, or with --cluster the batch scripts; starts nothing."),
    ] = False,
) -> None:
    """Runs what is missing of encoders x data sets x protocols; several at a time where there are several GPUs.

    All of it is checked before the first is started. What is there is passed over. What fails is told at the end, and
    the exit status is then 1; the same command goes on from there.
    """
    from launch.suites.run import run_suite, submit_suite

    assert context.parent is not None  # `pretrain eval`, whose commands the suite is made of
    commands = context.parent.command.commands  # type: ignore[attr-defined]
    if cluster is not None:
        submit_suite(suite_path, cluster, out, commands=commands, dry_run=dry_run)
        return
    raise typer.Exit(run_suite(suite_path, out, commands=commands, dry_run=dry_run))
