"""What commands have in common: how one is declared, its examples, and the arguments that several take."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import typer
from typer.core import TyperCommand

from data_pipeline.local_paths import refuse_secrets, refuse_url


def examples(*lines: str) -> str:
    """Returns the end of a command's help, with one example a line."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


class Command(TyperCommand):
    """A command whose usage names its arguments plainly: RECIPE, [RUN]... where several or none may be given.

    None of its values is a URL with a password or a signature: from here they would get into reports and records.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        rest = super().parse_args(ctx, args)
        for parameter in self.params:
            for value in _listed(ctx.params.get(parameter.name)):
                refuse_secrets(_name(parameter), value)
        return rest

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        pieces = [self.options_metavar] if self.options_metavar else []
        for parameter in self.get_params(ctx):
            if parameter.param_type_name == "argument":
                name = parameter.metavar or str(parameter.name).upper()
                pieces.append((name if parameter.required else f"[{name}]") + ("..." if parameter.nargs != 1 else ""))
        return pieces


class App(typer.Typer):
    """An app of such commands. Their parameters that are paths take no URL: what is written, is on this machine."""

    def command(self, *arguments: Any, **options: Any) -> Any:
        add = super().command(*arguments, **{"cls": Command, **options})
        return lambda function: add(_with_local_paths(function))


def _with_local_paths(command: Any) -> Any:
    signature = inspect.signature(command, eval_str=True)
    parameters = [p.replace(annotation=_local(p.annotation)) for p in signature.parameters.values()]
    command.__signature__ = signature.replace(parameters=parameters)
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def _local(annotation: Any) -> Any:
    """What typer is to see in place of an annotation: one of a path looks at its values, of any other the same."""
    kind, *told = get_args(annotation) if get_origin(annotation) is Annotated else (annotation,)
    if not _holds_paths(kind):
        return annotation
    (info,) = map(copy.copy, told)
    info.callback = _refuse_urls
    return Annotated[kind, info]


def _holds_paths(kind: Any) -> bool:
    return kind is Path or any(map(_holds_paths, get_args(kind)))


def _refuse_urls(parameter: typer.CallbackParam, value: Any) -> Any:
    for path in _listed(value):
        if path is not None:
            refuse_url(_name(parameter), path)
    return value


def _listed(value: Any) -> Iterable[Any]:
    return value if isinstance(value, list | tuple) else [value]


def _name(parameter: Any) -> str:
    """Returns what a user calls an option or argument."""
    name = parameter.opts[0] if parameter.opts[0].startswith("-") else parameter.metavar or str(parameter.name).upper()
    return str(name).removesuffix("...")


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
