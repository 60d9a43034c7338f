"""`pretrain submit`: a run as a job of a cluster."""

from __future__ import annotations

from typing import Annotated

import typer

from launch.commands.arguments import (
    ClusterPath,
    NumNodes,
    Overrides,
    RecipePath,
    RunFolder,
    command_app,
    examples,
)

app = command_app()


@app.command(
    epilog=examples(
        "pretrain submit configs/recipes/mae_vit_b16.yaml --cluster configs/cluster/gpu.yaml --nodes 4",
        "pretrain submit configs/recipes/mae_vit_b16.yaml --cluster configs/cluster/gpu.yaml --dry-run",
        "pretrain submit configs/recipes/cpu/mae_cifar10.yaml --cluster configs/cluster/two_nodes.yaml --nodes 1 "
        "--local",
    )
)
def submit(
    recipe_path: RecipePath,
    cluster_path: ClusterPath,
    nodes: NumNodes = None,
    out: RunFolder = None,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Prints the batch script and starts nothing.")] = False,
    local: Annotated[bool, typer.Option("--local", help="Runs the same job on this machine, without SLURM.")] = False,
) -> None:
    """Queues a run on a SLURM cluster, or goes on with one, and says how to follow it.

    Recipe, data and cluster are checked first. The job runs a copy of the code; it saves before its time is over
    or when it is preempted, is queued again, and goes on at any number of nodes.
    """
    from launch.jobs.submit import submit as submit_run

    submit_run(recipe_path, cluster_path, out=out, nodes=nodes, overrides=overrides, dry_run=dry_run, local=local)
