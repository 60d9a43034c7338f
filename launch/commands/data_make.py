"""`pretrain data make`: images with true labels, made on the spot."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from launch.commands.data_arguments import Out, ShardSize, Workers, summary

MAKE_EXAMPLES = (
    "pretrain data make fractals data/fractals/train --samples 10000 --size 32",
    "pretrain data make fractals data/fractals/test --samples 2000 --size 32 --split test",
    "pretrain data make shapes data/shapes/train --samples 20000 --size 64",
    "pretrain data make digits data/digits/test --samples 360 --size 32 --split test",
)


class Kind(StrEnum):
    fractals = "fractals"
    shapes = "shapes"
    digits = "digits"


class Split(StrEnum):
    train = "train"
    test = "test"


def make(
    kind: Annotated[Kind, typer.Argument(help="What is to be seen.", metavar="fractals|shapes|digits")],
    out: Out,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Images to make.")],
    size: Annotated[int, typer.Option("--size", help="Side of the square images, pixels.")] = 32,
    seed: Annotated[int, typer.Option("--seed", help="Of the images; classes never change.")] = 0,
    split: Annotated[Split, typer.Option("--split", help="Other images of the same classes.")] = Split.train,
    classes: Annotated[int, typer.Option("--classes", help="Number of classes (fractals).")] = 10,
    shard_size: ShardSize = 1000,
    workers: Workers = 0,
) -> None:
    """Makes images on the spot, with true labels, so that anything can be tried without a download.

    fractals: iterated function systems, a class each. shapes: scenes of colored shapes with captions; the
    test split has pairs of color and shape that train never shows. digits: real handwritten ones, from
    scikit-learn.
    """
    from data_pipeline.parallel import num_cores
    from data_pipeline.procedural.make import make as make_images

    manifest = make_images(
        kind.value,
        out,
        num_samples=samples,
        size=size,
        seed=seed,
        split=split.value,
        num_classes=classes,
        shard_size=shard_size,
        workers=workers or num_cores(),
    )
    print(summary(manifest))
