"""What the commands of `pretrain data` have in common: arguments, and how a data set is summed up in a line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from data_pipeline.messages import visible

if TYPE_CHECKING:
    from data_pipeline.shards.manifest import Manifest

Out = Annotated[Path, typer.Argument(metavar="OUT", help="Folder of the dataset; new, or one to go on with.")]
Shards = Annotated[
    str, typer.Argument(metavar="SHARDS", help="A folder of tars, a tar, or a pattern: dir/{000..009}.tar.")
]
ShardSize = Annotated[int, typer.Option("--shard-size", min=1, help="Samples per shard, at most.")]
Workers = Annotated[
    int, typer.Option("--workers", min=0, help="Processes; 0: one per core. Changes nothing in the result.")
]
MaxPixels = Annotated[int, typer.Option("--max-pixels", min=1, help="An image of more is bad.")]


def summary(manifest: Manifest) -> str:
    """Returns a line with counts, sizes and fields of a data set."""
    labels = "no labels"
    if manifest.label_counts is not None:
        labels = f"{len(manifest.classes or manifest.label_counts):,} classes"
    parts = [
        f"{manifest.total:,} samples",
        labels,
        shards_text(len(manifest.names)),
        megabytes(int(manifest.num_bytes.sum())),
        f"fields {' '.join(manifest.fields)}",
    ]
    return visible(f"{manifest.root}: {', '.join(parts)}")


def shards_text(count: int) -> str:
    return "1 shard" if count == 1 else f"{count:,} shards"


def megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB"
