"""`pretrain logs`: what a job wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from launch.commands.arguments import command_app, examples

app = command_app()


@app.command(
    epilog=examples("pretrain logs runs/mae_cifar10 --follow", "pretrain logs runs/mae_cifar10 --rank 3 --lines 200")
)
def logs(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")],
    follow: Annotated[
        bool, typer.Option("--follow", help="Goes on with what comes, also after requeues, until the run is over.")
    ] = False,
    rank: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="Lines of this rank alone [the node of rank 0].")
    ] = None,
    lines: Annotated[int, typer.Option(min=1, help="Lines of each file, from its end.")] = 50,
) -> None:
    """Prints what a run's newest job wrote."""
    from launch.jobs.logs import show_logs

    show_logs(run, follow=follow, rank=rank, lines=lines)
