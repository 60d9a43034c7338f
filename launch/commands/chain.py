"""`pretrain chain`: stages one after another, on this machine or as jobs of a cluster."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from data_pipeline.errors import InputError
from launch.commands.arguments import command_app, examples

app = command_app()


@app.command(
    epilog=examples(
        "pretrain chain configs/chains/cpu/noisy_student.yaml --nproc 2",
        "pretrain chain configs/chains/cpu/mae_pretraining.yaml --out runs/pre",
        "pretrain chain configs/chains/noisy_student.yaml --cluster configs/cluster/gpu.yaml",
    )
)
def chain(
    chain_path: Annotated[Path, typer.Argument(metavar="FILE", help="A chain, such as configs/chains/*.yaml.")],
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder of the chain [runs/<its name>].")] = None,
    num_ranks: Annotated[
        int | None, typer.Option("--nproc", min=1, help="Processes of each training on this machine [1].")
    ] = None,
    cluster: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Queues stages as jobs there, each after those it takes from.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="With --cluster: prints the batch scripts and starts nothing.")
    ] = False,
) -> None:
    """Runs stages one after another: train, label, select, evaluate; or goes on where they were interrupted.

    All stages are checked before the first is started. What is finished is passed over, what was interrupted goes
    on, and a stage whose settings or inputs changed is refused.
    """
    if cluster is None:
        from launch.chains.run import run_chain

        if dry_run:
            raise InputError("--dry-run", "--cluster beside it", "none", "Name the cluster file, or leave it out.")
        raise typer.Exit(run_chain(chain_path, out, num_ranks or 1, evaluation_commands))
    from launch.chains.submit import submit_chain

    if num_ranks is not None:
        raise InputError("--nproc", "no --cluster beside it", str(cluster), "Set nodes and ranks_per_node there.")
    submit_chain(chain_path, cluster, out, evaluation_commands, dry_run=dry_run)


def evaluation_commands() -> Mapping[str, Any]:
    """Returns the commands of `pretrain eval` by name, by which stages are checked."""
    from launch.commands import eval as eval_commands

    group: Any = typer.main.get_command(eval_commands.app)
    return dict(group.commands)
