"""`pretrain eval linear`."""

from __future__ import annotations

from typing import Annotated

import typer

from launch.eval_options import (
    BatchSize,
    BlocksOption,
    Device,
    DeviceOption,
    ImageSize,
    LimitTest,
    LimitTrain,
    ModelName,
    Options,
    Out,
    Pooling,
    PoolingOption,
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
    keep,
    load_encoder,
    readout,
)


def linear(
    context: typer.Context,
    encoder: Source,
    train: Train,
    test: Test,
    learning_rate: Annotated[
        list[float] | None, typer.Option("--lr", help="For a batch of 256; repeatable. Default: DINOv2's 13.")
    ] = None,
    weight_decay: Annotated[
        list[float], typer.Option("--weight-decay", help="Repeatable; each goes with each learning rate.")
    ] = [0.0],  # noqa: B006
    min_steps: Annotated[int, typer.Option("--min-steps", min=1, help="Or 10 epochs, where that is more.")] = 5000,
    pooling: PoolingOption = Pooling.own,
    blocks: BlocksOption = 1,
    random_init: RandomInit = False,
    out: Out = None,
    device: DeviceOption = Device.auto,
    batch_size: BatchSize = 256,
    num_workers: Workers = 0,
    precision: PrecisionOption = Precision.fp32,
    limit_train: LimitTrain = None,
    limit_test: LimitTest = None,
    seed: Seed = None,
    model: ModelName = None,
    image_size: ImageSize = None,
    option: Options = None,
    weights: Weights = None,
) -> None:
    """Linear probe on cached features: a grid trained side by side, chosen on a split of the training set."""
    from data_pipeline.read import open_dataset
    from pretrain.evals.linear import DINOV2_LEARNING_RATES, Linear, LinearConfig

    check_out(out)
    evaluator = Linear(
        open_dataset(train),
        open_dataset(test),
        LinearConfig(
            learning_rates=tuple(learning_rate or DINOV2_LEARNING_RATES),
            weight_decays=tuple(weight_decay),
            min_steps=min_steps,
            seed=seed or 0,
            max_train=limit_train,
            max_test=limit_test,
        ),
        extraction=extraction(batch_size, num_workers, precision, [readout(pooling, blocks)]),
    )
    built = architecture(encoder, model, image_size, option)
    judged = load_encoder(encoder, random_init, seed, built, device, weights)
    keep(evaluator.run(judged), judged.run, out, context)
