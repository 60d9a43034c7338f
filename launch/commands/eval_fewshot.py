"""`pretrain eval fewshot`."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from data_pipeline.errors import InputError
from launch.commands.eval_options import ClassData, EncoderOptions, How, ReadoutOptions
from launch.commands.eval_run import judge
from launch.commands.option_groups import grouped


class Classifier(StrEnum):
    centroid = "centroid"
    knn = "knn"
    linear = "linear"


@grouped
def fewshot(
    context: typer.Context,
    *,
    data: ClassData,
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
    feature: ReadoutOptions,
    source: EncoderOptions,
    how: How,
) -> None:
    """A simple classifier on a few labels of each class, on frozen features, over several draws."""
    from data_pipeline.datasets.read import open_dataset
    from pretrain.evals.fewshot.protocol import Fewshot, FewshotConfig

    if shots and fraction:
        raise InputError(where="--fraction", expected="it or --shots", found="both")
    for share in fraction or ():
        if not 0 < share < 1:
            raise InputError(where="--fraction", expected="shares between 0 and 1", found=str(share))
    how.begin(context)
    evaluator = Fewshot(
        open_dataset(data.train),
        open_dataset(data.test),
        FewshotConfig(
            shots=tuple(fraction or shots or (1, 5, 10)),
            seeds=seeds,
            classifier=classifier.value,
            max_train=data.limit_train,
            max_test=data.limit_test,
        ),
        extraction=how.extraction([feature.readout()]),
    )
    judge(evaluator, source.load(), how.out, context)
