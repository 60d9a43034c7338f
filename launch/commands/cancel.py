"""`pretrain cancel`: stops what was submitted."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from launch.commands.arguments import command_app, examples

app = command_app()


@app.command(
    epilog=examples(
        "pretrain cancel runs/mae_vit_b16",
        "pretrain cancel runs/mae_vit_b16 --now",
        "pretrain cancel runs/noisy_student",
    )
)
def cancel(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run, or of a chain: all of its jobs.")],
    now: Annotated[bool, typer.Option("--now", help="Does not save first.")] = False,
) -> None:
    """Stops what was submitted; a run saves first, so that submitting it again goes on from there."""
    from launch.jobs.cancel import cancel as cancel_jobs

    cancel_jobs(run, now)
