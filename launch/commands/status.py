"""`pretrain status`: a table of runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from launch.commands.arguments import command_app, examples

app = command_app()


@app.command(
    epilog=examples("pretrain status", "pretrain status runs/mae_cifar10", "pretrain status --json | jq .[].state")
)
def status(
    runs: Annotated[
        list[Path] | None, typer.Argument(metavar="RUN", help="Runs, or folders that hold some [runs].")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON list, for machines.")] = False,
) -> None:
    """Shows a table of runs: state, progress, speed, time left, last checkpoint, requeues, last error."""
    from launch.jobs.status import show_status

    show_status(runs or [Path("runs")], as_json=as_json)
