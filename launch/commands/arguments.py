"""What commands have in common: how one is declared, its examples, and the arguments that several take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand


def examples(*lines: str) -> str:
    """Returns the end of a command's help, with one example a line."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


class Command(TyperCommand):
    """A command whose usage names its arguments plainly: RECIPE, [RUN]... where several or none may be given."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        pieces = [self.options_metavar] if self.options_metavar else []
        for parameter in self.get_params(ctx):
            if parameter.param_type_name == "argument":
                name = parameter.metavar or str(parameter.name).upper()
                pieces.append((name if parameter.required else f"[{name}]") + ("..." if parameter.nargs != 1 else ""))
        return pieces


class App(typer.Typer):
    """An app of such commands."""

    def command(self, *arguments: Any, **options: Any) -> Any:
        return super().command(*arguments, **{"cls": Command, **options})


def command_app(help: str | None = None, epilog: str | None = None, *, is_group: bool = False) -> typer.Typer:
    """Returns an app that looks and fails like all others; the only command of one that is no group is the app."""
    return App(
        help=help,
        epilog=epilog,
        no_args_is_help=is_group,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )


RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe, such as configs/recipes/*.yaml.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Overrides a key of the recipe; may be repeated."),
]
NumRanks = Annotated[int, typer.Option("--nproc", min=1, help="Processes on this machine.")]
RunFolder = Annotated[
    Path | None, typer.Option("--out", metavar="RUN", help="Folder of the run [runs/<name of the recipe>].")
]
ClusterPath = Annotated[
    Path, typer.Option("--cluster", metavar="FILE", help="What is asked of SLURM, such as configs/cluster/*.yaml.")
]
NumNodes = Annotated[
    int | None, typer.Option("--nodes", min=1, help="Another number of nodes than the cluster file's.")
]
