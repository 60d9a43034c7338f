"""`pretrain eval finetune`."""

from __future__ import annotations

import signal
import sys
import tempfile
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from data_pipeline.errors import InputError
from launch.commands.eval_options import EncoderOptions, How, Precision, Test, Train, Workers, check_out
from launch.commands.eval_run import keep
from launch.commands.option_groups import grouped

if TYPE_CHECKING:
    from pretrain.evals.finetune.protocol import Trainer
    from pretrain.recipe.recipe import Recipe


class Paper(StrEnum):
    mae = "mae"


@grouped
def finetune(
    context: typer.Context,
    *,
    train: Train,
    test: Test,
    paper: Annotated[
        Paper | None, typer.Option("--paper", help="A paper's setting. Default: one for small data sets, 20 epochs.")
    ] = None,
    epochs: Annotated[float | None, typer.Option("--epochs", help="In place of the setting's.")] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", min=1, help="Of one step, over all processes; the setting's else.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Overrides a key of the recipe; may be repeated."),
    ] = None,
    num_ranks: Annotated[int, typer.Option("--nproc", min=1, help="Processes on this machine, to train.")] = 1,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="Report to write (.json); training is kept beside it. Default: RUN/evals/, where there is a run.",
        ),
    ] = None,
    num_workers: Workers = 0,
    precision: Annotated[
        Precision | None, typer.Option("--precision", help="Of training. Default: bf16 on CUDA, else fp32.")
    ] = None,
    source: EncoderOptions,
) -> None:
    """The whole encoder is trained with a classifier; the last step is tested. Started again, it goes on."""
    from pretrain.evals.finetune.protocol import Finetune
    from pretrain.evals.finetune.recipe import FinetuneConfig

    check_out(out)
    judged = source.load()
    if out is not None:
        folder = out.with_suffix("")
    elif judged.run is not None:
        folder = judged.run / "evals" / f"finetune-{judged.tag}"
    else:
        raise InputError(
            where="--out", expected="a report to train beside, as the encoder is of no run", found="none",
            fix="Add --out NAME.json.",
        )  # fmt: skip
    evaluator = Finetune(
        train,
        test,
        FinetuneConfig(
            preset=paper.value if paper else "small",
            epochs=epochs,
            batch_size=batch_size,
            seed=source.seed or 0,
            precision=precision.value if precision else None,
            num_workers=num_workers,
            device=source.device.value,
            overrides=tuple(overrides or ()),
        ),
        out=folder,
        trainer=ranks(num_ranks),
        num_ranks=num_ranks,
        extraction=How(num_workers=num_workers).extraction(),
    )
    keep(evaluator.run(judged), judged.run, out, context)


def ranks(num_ranks: int) -> Trainer:
    """Trains in processes of their own, even one: DeepSpeed keeps what belongs to its first run in a process."""

    def train(recipe: Recipe, run: Path) -> None:
        from launch.ranks.launcher import launch
        from pretrain.recipe.files import dump
        from pretrain.runtime.signals import STOPPED, Request, signals

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "recipe.yaml"
            path.write_text(dump(recipe), "utf-8")
            # Where SIGTERM asks the ranks to save, they are to have the time for it.
            saving: dict[int, int] = {
                signum: signal.SIGUSR2 for signum, request in signals().items() if request == Request.STOP
            }
            arguments = [str(path), "--out", str(run)]
            status = launch(arguments, num_ranks, threads=recipe.runtime.threads, passed_on=saving)
        if status == STOPPED:
            print(f"{run}: asked to stop, and saved; the same command goes on", file=sys.stderr)
        if status:  # a rank has said why
            raise typer.Exit(status)

    return train
