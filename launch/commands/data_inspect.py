"""`pretrain data index`, `verify` and `stats`: the contents of shards."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from data_pipeline.messages import visible
from launch.commands.data_arguments import MaxPixels, Shards, Workers, megabytes, shards_text, summary

if TYPE_CHECKING:
    from data_pipeline.inspect.stats import Stats
    from data_pipeline.shards.manifest import Manifest

INDEX_EXAMPLES = (
    "pretrain data index /datasets/laion-sample",
    "pretrain data index '/datasets/imagenet/train-{0000..1023}.tar' --classes classes.txt",
)
VERIFY_EXAMPLES = ("pretrain data verify data/cifar10/train",)
_FROM_SOURCE = (
    "The shards are whole, and have these images as their source had them: training puts others in their place and "
    "evaluations leave them out, up to data.max_bad_samples; to be rid of them, repair the source and convert it again."
)
STATS_EXAMPLES = ("pretrain data stats data/cifar10/train --out cifar10.png",)


def index(
    shards: Shards,
    classes: Annotated[
        Path | None, typer.Option("--classes", metavar="FILE", help="Names of labels 0, 1, ...; one a line.")
    ] = None,
    workers: Workers = 0,
) -> None:
    """Makes WebDataset tars from elsewhere readable: an index beside each, and a manifest."""
    from data_pipeline.parallel import num_cores
    from data_pipeline.shards.scan import index_shards

    names = None if classes is None else _class_names(classes)
    manifest = index_shards(shards, classes=names, workers=workers or num_cores())
    print(summary(manifest))
    if manifest.keys == "by shard":
        print(f"keys come again in several shards: each goes by its shard, such as {manifest.names[0]}/KEY")


def verify(shards: Shards, max_pixels: MaxPixels = 50_000_000, workers: Workers = 0) -> None:
    """Reads everything: hashes, tar headers, indexes, counts; decodes every image. Names each fault."""
    from data_pipeline.errors import ShardError
    from data_pipeline.inspect.verify import verify as verify_shards
    from data_pipeline.parallel import num_cores

    found = verify_shards(shards, max_pixels=max_pixels, workers=workers or num_cores())
    for fault in found.faults:
        print(visible(str(fault), lines=True))
    if found.faults:
        of_source = all(fault.of_source for fault in found.faults)
        raise ShardError(
            where=shards,
            expected="a dataset without a fault",
            found=f"{len(found.faults):,} (listed above)",
            fix=_FROM_SOURCE if of_source else "Copy the shards again, or make them again.",
        )
    size = f"{shards_text(found.num_shards)}, {megabytes(found.num_bytes)}"
    print(f"{shards}: sound; {found.num_samples:,} samples in {size}")


def stats(
    shards: Shards,
    out: Annotated[Path, typer.Option("--out", metavar="PNG", help="The contact sheet to write.")] = Path(
        "contact_sheet.png"
    ),
    max_pixels: MaxPixels = 50_000_000,
) -> None:
    """Prints counts, sizes, classes and the histogram of labels; draws a contact sheet."""
    from data_pipeline.inspect.stats import stats as look_through

    found = look_through(shards, out, max_pixels=max_pixels)
    print("\n".join([summary(found.manifest), *_sizes(found), *_histogram(found.manifest)]))
    for error in found.left_out:
        print(visible(f"not on the contact sheet: {error}", lines=True))
    print(f"contact sheet: {out}")


def _class_names(path: Path) -> list[str]:
    from data_pipeline.errors import DataError
    from data_pipeline.text_files import read_text

    names = [name.strip() for name in read_text(path, "a text file, one class name a line").split("\n")]
    while names and not names[-1]:
        names.pop()
    if not all(names) or not names:
        raise DataError(where=str(path), expected="a class name in every line", found="an empty one")
    return names


def _sizes(found: Stats) -> list[str]:
    import numpy as np

    small, middle, large = np.percentile(found.image_bytes, [0, 50, 100])
    lines = [f"bytes of an image: {small:,.0f} to {large:,.0f}, median {middle:,.0f}"]
    widths, heights = found.pixels.T
    lines.append(
        f"pixels, of {len(found.pixels)} images: width {widths.min()} to {widths.max()}, "
        f"height {heights.min()} to {heights.max()}"
    )
    return lines


def _histogram(manifest: Manifest) -> list[str]:
    """Returns a line for each class, with a bar."""
    if manifest.label_counts is None:
        return []
    names = [visible(name) for name in manifest.classes or map(str, range(len(manifest.label_counts)))]
    width = max(len(name) for name in names)
    most = max(int(manifest.label_counts.max()), 1)
    return [
        f"  {label:>5} {name:<{width}} {count:>9,} {'#' * round(40 * count / most)}"
        for label, (name, count) in enumerate(zip(names, manifest.label_counts.tolist(), strict=True))
    ]
