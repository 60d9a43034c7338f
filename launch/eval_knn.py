"""`pretrain eval knn`."""

from __future__ import annotations

import math
from typing import Annotated

import typer

from data_pipeline.errors import InputError
from launch.eval_options import (
    BatchSize,
    BlocksOption,
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
    judge,
    load_encoder,
    over_ranks,
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
    temperature: Annotated[
        list[float],
        typer.Option(
            "--temperature", help="T of the weights exp(cosine / T); repeatable, the first is the reported one."
        ),
    ] = [0.07],  # noqa: B006
    pooling: PoolingOption = Pooling.own,
    blocks: BlocksOption = 1,
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
    """Exact weighted k nearest neighbours on L2-normalised features (1805.01978)."""
    from data_pipeline.read import open_dataset
    from pretrain.evals.knn import Knn
    from pretrain.recipe import InlineKnn

    if wrong := [t for t in temperature if not 0 < t < math.inf]:
        raise InputError(where="--temperature", expected="a number above 0", found=", ".join(map(str, wrong)))
    check_out(out)
    over_ranks(context, nproc, cache)
    evaluator = Knn(
        open_dataset(train),
        open_dataset(test),
        InlineKnn(
            kind="knn",
            train=train,
            test=test,
            k=k[0],
            temperature=temperature[0],
            max_train=limit_train,
            max_test=limit_test,
        ),
        sweep=k[1:],
        temperatures=temperature[1:],
        extraction=extraction(batch_size, num_workers, precision, cache, [readout(pooling, blocks)]),
    )
    built = architecture(encoder, model, image_size, option)
    judged = load_encoder(encoder, random_init, seed, built, device, weights)
    judge(evaluator, judged, out, context)
