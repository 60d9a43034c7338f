"""`pretrain demo`: the main job in minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from launch.commands.arguments import command_app, examples

app = command_app()


@app.command(epilog=examples("pretrain demo", "pretrain demo --out /tmp/demo"))
def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where all of it is written.")] = Path("runs/demo"),
) -> None:
    """Makes images and shards, trains SimCLR on two processes, judges it, writes a report: one to two minutes."""
    from launch.demo import main as run_demo

    run_demo(out)
