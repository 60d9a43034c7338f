"""The console script `pretrain`. A command's module is imported when it is called, so that help is instant."""

from __future__ import annotations

import faulthandler
import io
import os
import sys

if __name__ == "__main__":  # before anything is imported that could be found in the working folder
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    from pretrain.runtime.safe_path import leave_working_folder

    del sys.path[0]
    leave_working_folder("launch.cli")

from importlib import import_module
from typing import Annotated

import typer
from typer.core import TyperCommand

from data_pipeline.errors import PretrainError, storage_error
from launch.commands.arguments import command_app, examples
from pretrain.monitoring.outlets import hide_secrets
from pretrain.recipe.home import expand_words
from pretrain.runtime import lean_imports

# The commands in the order of help, each an app in launch/commands; the text is the first sentence of its own help.
COMMANDS = {
    "show": "Prints a recipe with every value written out, and what follows from it at a number of processes.",
    "train": "Trains a recipe on this machine, or goes on with a run that was interrupted.",
    "submit": "Queues a run on a SLURM cluster, or goes on with one, and says how to follow it.",
    "drill": "Proves on this cluster, before the quota is spent, that a disturbed run ends as one that is not.",
    "cancel": "Stops what was submitted; a run saves first, so that submitting it again goes on from there.",
    "chain": "Runs stages one after another: train, label, select, evaluate; or goes on where they were interrupted.",
    "status": "Shows a table of runs: state, progress, speed, time left, last checkpoint, requeues, last error.",
    "logs": "Prints what a run's newest job wrote.",
    "doctor": "Looks at machine, cluster, storage, data and memory, before anything is started.",
    "demo": "Makes images and shards, trains SimCLR on two processes, judges it, writes a report: one to two minutes.",
    "report": "Writes report.html: a page about a run, or tables, figures and differences of several encoders.",
    "data": "Makes, converts, checks, describes and labels shards.",
    "eval": "Judges encoders: kNN, probes, few-shot, fine-tuning, zero-shot, retrieval.",
}

app = command_app(
    "Pretrain vision encoders: WebDataset tars in, judged encoders out.",
    examples(
        "pretrain demo",
        "pretrain data convert images.tar.gz data/images --split-by-folder",
        "pretrain train configs/recipes/cpu/mae_cifar10.yaml --nproc 2",
        "pretrain eval knn runs/mae_cifar10 --train data/cifar10/train --test data/cifar10/test",
    ),
    is_group=True,
)


def main() -> int:
    """The entry point, and the one place where an error becomes a message and an exit status."""
    lean_imports.install()
    faulthandler.enable(2)  # where a file got smaller that is mapped into memory, the process says where it was
    hide_secrets()
    for stream in (sys.stdout, sys.stderr):  # names of files and classes may hold what a terminal's encoding does not
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        app(prog_name="pretrain")
    except Exception as error:
        told = error if isinstance(error, PretrainError) else storage_error(error)
        if told is None:
            raise
        print(f"error: {told}", file=sys.stderr)
        return told.exit_status
    return 0


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(version("pretrain"))
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Prints the version and exits."),
    ] = False,
) -> None:
    """Options that stand before the command; the help is the application's own."""


def _mount(name: str, text: str) -> None:
    """Makes a command that hands all its words to the app of its module, which is imported only then."""

    @app.command(
        name,
        cls=TyperCommand,  # of its words none is looked at here
        help=text,
        add_help_option=False,
        context_settings={
            "allow_extra_args": True,
            "ignore_unknown_options": True,
            "allow_interspersed_args": False,
            "help_option_names": [],
        },
    )
    def hand_over(context: typer.Context) -> None:
        own = import_module(f"launch.commands.{name}").app
        words = expand_words(context.args) or (["--help"] if own.info.no_args_is_help else [])
        own(words, prog_name=f"pretrain {name}")


for _name, _text in COMMANDS.items():
    _mount(_name, _text)


if __name__ == "__main__":
    sys.exit(main())
