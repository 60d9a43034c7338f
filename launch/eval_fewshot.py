"""`pretrain eval fewshot`."""

from __future__ import annotations

from enum import StrEnum
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


class Classifier(StrEnum):
    centroid = "centroid"
    knn = "knn"
    linear = "linear"


def fewshot(
    context: typer.Context,
    encoder: Source,
    train: Train,
    test: Test,
    shots: Annotated[
        list[int] | None,
        typer.Option("--shots", min=1, help="Labels per class; repeatable, the first is reported. Default: 1, 5, 10."),
    ] = None,
    fraction: Annotated[
        list[float] | None,
        typer.Option("--fraction", help="In place of --shots: share of each class's labels, as 0.01; repeatable."),
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Draws, of which mean and spread are given.")] = 5,
    classifier: Annotated[
        Classifier, typer.Option("--classifier", help="What learns from the labels: nothing in it is chosen.")
    ] = Classifier.centroid,
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
    """A simple classifier on a few labels of each class, on frozen features, over several draws."""
    from data_pipeline.read import open_dataset
    from pretrain.evals.fewshot import Fewshot, FewshotConfig

    check_out(out)
    over_ranks(context, nproc, cache)
    if shots and fraction:
        raise InputError(where="--fraction", expected="it or --shots", found="both")
    for share in fraction or ():
        if not 0 < share < 1:
            raise InputError(where="--fraction", expected="shares between 0 and 1", found=str(share))
    evaluator = Fewshot(
        open_dataset(train),
        open_dataset(test),
        FewshotConfig(
            shots=tuple(fraction or shots or (1, 5, 10)),
            seeds=seeds,
            classifier=classifier.value,
            max_train=limit_train,
            max_test=limit_test,
        ),
        extraction=extraction(batch_size, num_workers, precision, cache, [readout(pooling, blocks)]),
    )
    built = architecture(encoder, model, image_size, option)
    judged = load_encoder(encoder, random_init, seed, built, device, weights)
    judge(evaluator, judged, out, context)
