"""`pretrain eval knn`."""

from __future__ import annotations

from typing import Annotated

import typer

from data_pipeline.errors import InputError
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


def knn(
    context: typer.Context,
    encoder: Source,
    train: Train,
    test: Test,
    k: Annotated[
        list[int], typer.Option("--k", min=1, help="Neighbours; repeatable, the first is the reported one.")
    ] = [20, 10, 100, 200],  # noqa: B006
    temperature: Annotated[float, typer.Option("--temperature", help="Of the weights exp(cosine / T).")] = 0.07,
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
    """Exact weighted k nearest neighbours on L2-normalised features (1805.01978)."""
    from data_pipeline.read import open_dataset
    from pretrain.evals.knn import Knn
    from pretrain.recipe import InlineKnn

    if temperature <= 0:
        raise InputError(where="--temperature", expected="a number above 0", found=str(temperature))
    check_out(out)
    evaluator = Knn(
        open_dataset(train),
        open_dataset(test),
        InlineKnn(
            kind="knn",
            train=train,
            test=test,
            k=k[0],
            temperature=temperature,
            max_train=limit_train,
            max_test=limit_test,
        ),
        sweep=k[1:],
        extraction=extraction(batch_size, num_workers, precision, [readout(pooling, blocks)]),
    )
    built = architecture(encoder, model, image_size, option)
    judged = load_encoder(encoder, random_init, seed, built, device, weights)
    keep(evaluator.run(judged), judged.run, out, context)
