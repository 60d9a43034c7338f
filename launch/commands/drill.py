"""`pretrain drill`: a rehearsal of what disturbs a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from launch.commands.arguments import ClusterPath, NumNodes, Overrides, RecipePath, command_app, examples

app = command_app()


@app.command(
    epilog=examples("pretrain drill configs/recipes/mae_vit_b16.yaml --cluster configs/cluster/gpu.yaml --nodes 2")
)
def drill(
    recipe_path: RecipePath,
    cluster_path: ClusterPath,
    nodes: NumNodes = None,
    steps: Annotated[int, typer.Option(min=6, help="Steps of each of the two runs.")] = 30,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where both are kept [runs/drill-<name of the recipe>].")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Proves on this cluster, before the quota is spent, that a disturbed run ends as one that is not.

    Two short jobs: one is left alone; the other is warned of its time limit, then killed, and is queued again each
    time. Their losses are compared step by step. Exit status 1 where they differ.
    """
    from launch.jobs.drill import drill as run_drill

    run_drill(recipe_path, cluster_path, nodes=nodes, steps=steps, out=out, overrides=overrides)
