"""`pretrain train`: a run on this machine."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from data_pipeline.errors import InputError
from data_pipeline.messages import killed_by
from launch.commands.arguments import NumRanks, RecipePath, command_app, examples
from pretrain.train_options import Option, TrainOptions

app = command_app()


def _with_train_options(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command, in place of its `**given`, the options of a training as typer is to see them."""
    own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.kind is not p.VAR_KEYWORD]
    further = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None if option.kind is list else default,
            annotation=_annotation(option),
        )
        for name, option, default in TrainOptions.described()
        if not option.own_jobs_only
    ]
    seen = [*own, *further]
    command.__signature__ = inspect.Signature(seen)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in seen}
    return command


def _annotation(option: Option) -> Any:
    least = 1 if option.kind is int else None
    shown = typer.Option(option.flag, metavar=option.metavar, min=least, help=option.help)
    kinds: dict[type, Any] = {Path: Path | None, int: int | None, bool: bool, list: list[str] | None}
    return Annotated[kinds[option.kind], shown]


@app.command(
    epilog=examples(
        "pretrain train configs/recipes/cpu/mae_cifar10.yaml --nproc 2",
        "pretrain train configs/recipes/cpu/mae_cifar10.yaml --set optim.base_lr=3e-4 --out runs/lr3",
        "pretrain train configs/recipes/cpu/mae_cifar10.yaml --max-steps 20 --overfit-batch",
    )
)
@_with_train_options
def train(recipe_path: RecipePath, num_ranks: NumRanks = 1, **given: Any) -> None:
    """Trains a recipe on this machine, or goes on with a run that was interrupted."""
    from dataclasses import replace

    from pretrain import __main__ as rank
    from pretrain.recipe.files import load_recipe
    from pretrain.runtime.signals import STOP_SIGNALS, stop_while_starting
    from pretrain.runtime.slurm_step import is_task_of_several

    if num_ranks > 1 and is_task_of_several():
        raise InputError(
            where=f"--nproc {num_ranks}", expected="one process in each task of srun, which are the ranks",
            found=f"{os.environ['SLURM_STEP_NUM_TASKS']} tasks",
            fix="Leave --nproc out; `srun --ntasks-per-node N` says how many ranks a node has.",
        )  # fmt: skip
    if num_ranks > 1:
        stop_while_starting()
    options = TrainOptions(**{**given, "overrides": tuple(given["overrides"] or ())})
    recipe = load_recipe(recipe_path, list(options.overrides))
    out = options.out or rank.default_out(recipe)
    arguments = [str(recipe_path), *replace(options, out=out).words()]
    if num_ranks == 1:
        raise typer.Exit(rank.main(arguments))
    from pretrain.inputs import refuse_wrong_inputs

    refuse_wrong_inputs(recipe)
    typer.echo(f"starting: checking {recipe.name} for {num_ranks} processes", err=True)
    from launch.ranks.launcher import SAVING, launch
    from pretrain.preflight import preflight
    from pretrain.run import output_folder
    from pretrain.runtime.failure import note_failure
    from pretrain.runtime.run_folder import is_claimed, is_run

    run = output_folder(out, options.overfit_batch)
    preflight(recipe, num_ranks, run)  # one message, before anything is started
    status = launch(arguments, num_ranks, threads=recipe.runtime.threads, passed_on=SAVING)
    if status > 128 and status - 128 not in STOP_SIGNALS and is_run(run) and not is_claimed(run):
        note_failure(run, f"a rank was killed by {killed_by(status - 128)}")  # which could not say so
    raise typer.Exit(status)
