"""`pretrain eval knn`."""

from __future__ import annotations

import math
from typing import Annotated

import typer

from data_pipeline.errors import InputError
from launch.commands.eval_options import ClassData, EncoderOptions, How, ReadoutOptions
from launch.commands.eval_run import judge
from launch.commands.option_groups import grouped


@grouped
def knn(
    context: typer.Context,
    *,
    data: ClassData,
    k: Annotated[
        list[int], typer.Option("--k", min=1, help="Neighbours; repeatable, the first is the reported one.")
    ] = [20, 10, 100, 200],  # noqa: B006
    temperature: Annotated[
        list[float],
        typer.Option(
            "--temperature", help="T of the weights exp(cosine / T); repeatable, the first is the reported one."
        ),
    ] = [0.07],  # noqa: B006
    feature: ReadoutOptions,
    source: EncoderOptions,
    how: How,
) -> None:
    """Exact weighted k nearest neighbours on L2-normalised features (1805.01978)."""
    from data_pipeline.datasets.read import open_dataset
    from pretrain.evals.knn.protocol import Knn
    from pretrain.recipe.recipe import InlineKnn

    if wrong := [t for t in temperature if not 0 < t < math.inf]:
        raise InputError(where="--temperature", expected="a number above 0", found=", ".join(map(str, wrong)))
    how.begin(context)
    evaluator = Knn(
        open_dataset(data.train),
        open_dataset(data.test),
        InlineKnn(
            kind="knn",
            train=data.train,
            test=data.test,
            k=k[0],
            temperature=temperature[0],
            max_train=data.limit_train,
            max_test=data.limit_test,
        ),
        sweep=k[1:],
        temperatures=temperature[1:],
        extraction=how.extraction([feature.readout()]),
    )
    judge(evaluator, source.load(), how.out, context)
