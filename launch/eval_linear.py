"""`pretrain eval linear`."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from data_pipeline.errors import InputError
from launch.eval_options import (
    BatchSize,
    Cache,
    Device,
    DeviceOption,
    ImageSize,
    LimitTest,
    LimitTrain,
    ModelName,
    NumRanks,
    Options,
    Out,
    Pooling,
    Precision,
    PrecisionOption,
    RandomInit,
    Seed,
    Source,
    Test,
    Train,
    Weights,
    Workers,
    architecture,
    check_out,
    extraction,
    judge,
    load_encoder,
    over_ranks,
    readout,
)

if TYPE_CHECKING:
    from pretrain.evals.linear_config import LinearConfig
    from pretrain.evals.readout import Readout


class Solver(StrEnum):
    sgd = "sgd"
    lars = "lars"
    lbfgs = "lbfgs"


class Paper(StrEnum):
    mae = "mae"


Rate = Annotated[
    list[float] | None,
    typer.Option("--lr", help="For a batch of 256; repeatable. Default: DINOv2's 13."),
]
Decay = Annotated[
    list[float] | None,
    typer.Option("--weight-decay", help="Repeatable; each goes with each learning rate. Default: 0."),
]
Penalty = Annotated[
    list[float] | None,
    typer.Option("--inverse-penalty", "-C", help="Of lbfgs, scikit-learn's C; repeatable. Default: 1e-5 to 1, by 10."),
]


def linear(
    context: typer.Context,
    encoder: Source,
    train: Train,
    test: Test,
    solver: Annotated[
        Solver | None, typer.Option("--solver", help="sgd (default), lars, or lbfgs: to the optimum, in fp64.")
    ] = None,
    paper: Annotated[
        Paper | None,
        typer.Option("--paper", help="mae: batch norm, LARS, batch 16384, 90 epochs, augmented; the rest overrides."),
    ] = None,
    learning_rate: Rate = None,
    weight_decay: Decay = None,
    inverse_penalty: Penalty = None,
    epochs: Annotated[int | None, typer.Option("--epochs", min=0, help="Default: 10.")] = None,
    warmup_epochs: Annotated[float | None, typer.Option("--warmup-epochs", min=0, help="Default: 0.")] = None,
    min_steps: Annotated[
        int | None, typer.Option("--min-steps", min=1, help="Or the epochs, where they are more. Default: 5000.")
    ] = None,
    head_batch_size: Annotated[
        int | None, typer.Option("--head-batch-size", min=1, help="Samples of a step of the classifier. Default: 1024.")
    ] = None,
    batch_norm: Annotated[
        bool | None,
        typer.Option("--batch-norm/--no-batch-norm", help="Before the classifier. Default: fixed statistics."),
    ] = None,
    initial_std: Annotated[
        float | None, typer.Option("--initial-std", min=0, help="Of the classifier's first weights. Default: 0.")
    ] = None,
    augment: Annotated[
        bool | None,
        typer.Option("--augment/--no-augment", help="Random crops and flips, through the encoder at every step."),
    ] = None,
    crop_scale: Annotated[
        tuple[float, float] | None, typer.Option("--crop-scale", help="Area of these crops. Default: 0.08 1.")
    ] = None,
    pooling: Annotated[
        list[Pooling],
        typer.Option(
            "--pooling",
            help="own: as the encoder does; else class token, mean of patches, both. Repeatable: the best is chosen.",
        ),
    ] = [Pooling.own],  # noqa: B006
    blocks: Annotated[
        list[int],
        typer.Option("--blocks", min=1, help="The last N blocks, side by side. Repeatable; each with each pooling."),
    ] = [1],  # noqa: B006
    random_init: RandomInit = False,
    out: Out = None,
    device: DeviceOption = Device.auto,
    batch_size: BatchSize = 256,
    num_workers: Workers = 0,
    precision: PrecisionOption = Precision.fp32,
    cache: Cache = None,
    nproc: NumRanks = 1,
    limit_train: LimitTrain = None,
    limit_test: LimitTest = None,
    seed: Seed = None,
    model: ModelName = None,
    image_size: ImageSize = None,
    option: Options = None,
    weights: Weights = None,
) -> None:
    """Linear probe: a grid trained side by side, chosen on a split of the training set, tested once."""
    from data_pipeline.read import open_dataset
    from pretrain.evals.linear import Linear

    check_out(out)
    over_ranks(context, nproc, cache)
    config = configured(
        paper,
        solver=solver and solver.value,
        learning_rates=learning_rate and tuple(learning_rate),
        weight_decays=weight_decay and tuple(weight_decay),
        inverse_penalties=inverse_penalty and tuple(inverse_penalty),
        epochs=epochs,
        warmup_epochs=warmup_epochs,
        min_steps=min_steps,
        batch_size=head_batch_size,
        batch_norm=batch_norm,
        initial_std=initial_std,
        augment=augment,
        crop_scale=crop_scale,
        seed=seed,
        max_train=limit_train,
        max_test=limit_test,
    )
    evaluator = Linear(
        open_dataset(train),
        open_dataset(test),
        config,
        extraction=extraction(batch_size, num_workers, precision, cache, readouts(pooling, blocks)),
    )
    built = architecture(encoder, model, image_size, option)
    judged = load_encoder(encoder, random_init, seed, built, device, weights)
    judge(evaluator, judged, out, context)


# Options that one solver has, and another would pass over in silence.
_BY_STEPS = {
    "learning_rates": "--lr",
    "weight_decays": "--weight-decay",
    "epochs": "--epochs",
    "warmup_epochs": "--warmup-epochs",
    "min_steps": "--min-steps",
    "batch_size": "--head-batch-size",
    "batch_norm": "--batch-norm",
    "initial_std": "--initial-std",
    "augment": "--augment",
}


def configured(paper: Paper | None, **options: Any) -> LinearConfig:
    """The preset, or the defaults, with what was given (not None) in their place.

    Raises:
        InputError: an option that has no say in what was asked for, or a value out of range.
    """
    from dataclasses import replace

    from pretrain.evals.linear_config import MAE, LinearConfig

    given = {name: value for name, value in options.items() if value is not None}
    preset = MAE if paper is Paper.mae else LinearConfig()
    exact = given.get("solver", preset.solver) == "lbfgs"
    idle = [option for name, option in _BY_STEPS.items() if exact and name in given]
    idle += ["--paper"] if exact and paper is not None else []
    idle += ["--inverse-penalty"] if not exact and "inverse_penalties" in given else []
    idle += ["--crop-scale"] if "crop_scale" in given and not given.get("augment", preset.augment) else []
    if idle:
        raise InputError(
            where=", ".join(idle),
            expected="options of the chosen solver",
            found=f"--solver {given.get('solver', preset.solver)}, for which they mean nothing",
            fix="Leave them out; --inverse-penalty goes with --solver lbfgs, --crop-scale with --augment.",
        )
    return replace(preset, **given)


def readouts(poolings: list[Pooling], blocks: list[int]) -> tuple[Readout, ...]:
    """Each pooling with each number of blocks; the encoder's own has no blocks and stands once, beside others."""
    others = [pooling for pooling in poolings if pooling is not Pooling.own]
    own = [readout(Pooling.own, 1)] if others and len(others) < len(poolings) else []
    return tuple(dict.fromkeys([*own, *(readout(p, b) for p in others or poolings for b in blocks)]))
