"""`pretrain doctor`: what would go wrong, found before anything is started."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from launch.commands.arguments import NumRanks, Overrides, RunFolder, command_app, examples

app = command_app()


@app.command(
    epilog=examples(
        "pretrain doctor",
        "pretrain doctor configs/recipes/cpu/mae_cifar10.yaml --nproc 2",
        "pretrain doctor configs/recipes/mae_vit_b16.yaml --cluster configs/cluster/gpu.yaml",
    )
)
def doctor(
    recipe_path: Annotated[
        Path | None, typer.Argument(metavar="RECIPE", help="A recipe; without one, the machine alone is looked at.")
    ] = None,
    overrides: Overrides = None,
    cluster: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A cluster file: what the run is to be submitted to.")
    ] = None,
    num_ranks: NumRanks = 1,
    out: RunFolder = None,
) -> None:
    """Looks at machine, cluster, storage, data and memory, before anything is started.

    Each line is ok, a warning, or an error with what to do. Starts nothing and leaves nothing behind.
    The exit status is 1 where there is an error.
    """
    from launch.doctor.doctor import examine

    raise typer.Exit(examine(recipe_path, overrides or [], cluster, num_ranks, out))
