"""`pretrain data ...`: make, convert, index, verify, describe and label shards."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launch.commands import label as label_commands

if TYPE_CHECKING:
    from data_pipeline.inspect.stats import Stats
    from data_pipeline.shards.manifest import Manifest


def _examples(*lines: str) -> str:
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


app = typer.Typer(
    help="Make, convert, check and describe shards: plain WebDataset tars with an index and a manifest.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


class Kind(StrEnum):
    fractals = "fractals"
    shapes = "shapes"
    digits = "digits"


class Split(StrEnum):
    train = "train"
    test = "test"


Out = Annotated[Path, typer.Argument(metavar="OUT", help="Folder of the dataset; new, or one to go on with.")]
Shards = Annotated[
    str, typer.Argument(metavar="SHARDS", help="A folder of tars, a tar, or a pattern: dir/{000..009}.tar.")
]
ShardSize = Annotated[int, typer.Option("--shard-size", min=1, help="Samples per shard, at most.")]
Workers = Annotated[
    int, typer.Option("--workers", min=0, help="Processes; 0: one per core. Changes nothing in the result.")
]
MaxPixels = Annotated[int, typer.Option("--max-pixels", min=1, help="An image of more is bad.")]


@app.command(
    epilog=_examples(
        "pretrain data make fractals data/fractals/train --samples 10000 --size 32",
        "pretrain data make fractals data/fractals/test --samples 2000 --size 32 --split test",
        "pretrain data make shapes data/shapes/train --samples 20000 --size 64",
        "pretrain data make digits data/digits/test --samples 360 --size 32 --split test",
    )
)
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

    fractals: iterated function systems, a class each. shapes: scenes of coloured shapes with captions; the
    test split has pairs of colour and shape that train never shows. digits: real handwritten ones, from
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
    print(_summary(manifest))


@app.command(
    epilog=_examples(
        "pretrain data convert cifar10.tar.gz data/cifar10 --split-by-folder",
        "pretrain data convert /datasets/imagenet/train data/imagenet/train --short-side 256 --workers 16",
        "pretrain data convert captions.csv data/coco --root /datasets/coco/train2017",
        "pretrain data convert birds.parquet data/birds --image-column file --label-column species",
        "pretrain data convert /downloads/laion data/laion --skip-bad",
        "pretrain data convert '/datasets/cc3m/{00000..00331}.tar' data/cc3m --caption-field json:caption",
    )
)
def convert(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SRC",
            help="An image folder, or a zip, tar or tar.gz of one; a table (.csv, .tsv, .parquet); a folder or "
            "brace pattern of WebDataset tars.",
        ),
    ],
    out: Out,
    shard_size: ShardSize = 1000,
    short_side: Annotated[
        int | None,
        typer.Option("--short-side", min=1, metavar="PX", help="Make larger images this small [bytes are kept]."),
    ] = None,
    split_by_folder: Annotated[
        bool, typer.Option("--split-by-folder", help="Top folders (train, test, ...) become OUT/train, ...")
    ] = False,
    root: Annotated[
        Path | None, typer.Option("--root", metavar="DIR", help="Table: where its paths begin [its own folder].")
    ] = None,
    image_column: Annotated[
        str | None, typer.Option("--image-column", metavar="NAME", help="Table: paths [image, path, file_name, ...].")
    ] = None,
    caption_column: Annotated[
        str | None,
        typer.Option("--caption-column", metavar="NAME", help="Table: captions [caption, text, ...]."),
    ] = None,
    label_column: Annotated[
        str | None,
        typer.Option("--label-column", metavar="NAME", help="Table: numbers or class names [label, class, cls]."),
    ] = None,
    allow_outside: Annotated[
        bool, typer.Option("--allow-outside", help="Table: its paths may lead out of the root.")
    ] = False,
    caption_field: Annotated[
        str | None,
        typer.Option(
            "--caption-field",
            metavar="FIELD[:KEY]",
            help="Shards: member, or entry of a JSON one, to be txt [txt].",
        ),
    ] = None,
    shuffle: Annotated[bool, typer.Option("--shuffle/--no-shuffle", help="In a random order, or by name.")] = True,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of that order.")] = 0,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out images that cannot be used, and say which.")
    ] = False,
    max_pixels: MaxPixels = 50_000_000,
    workers: Workers = 0,
) -> None:
    """Turns images into shards: of a folder, an archive, a table of files, or other WebDataset shards.

    Of a folder or an archive, folders inside are the classes, numbered by name. A table gives each image its
    caption, its label, or both. Shards, such as img2dataset writes, keep their members and are laid out anew.
    Nothing is unpacked or downloaded. Interrupted, it goes on when it is given again.
    """
    from data_pipeline.ingest.convert import ConvertOptions
    from data_pipeline.ingest.convert import convert as convert_images
    from data_pipeline.ingest.tables import Columns
    from data_pipeline.parallel import num_cores

    options = ConvertOptions(shard_size, short_side, split_by_folder, shuffle, seed, max_pixels)
    columns = Columns(image_column, caption_column, label_column, root, allow_outside)
    done = convert_images(
        source,
        out,
        options,
        columns=None if columns == Columns() else columns,
        caption_field=caption_field,
        skip_bad=skip_bad,
        workers=workers or num_cores(),
    )
    for error in done.bad:
        print(f"left out: {error}")
    left_out = done.num_images - sum(manifest.total for manifest in done.manifests.values())
    if left_out or done.num_others:
        print(f"left out {left_out:,} bad images and {done.num_others:,} files that are no images")
    for manifest in done.manifests.values():
        print(_summary(manifest))


@app.command(
    epilog=_examples(
        "pretrain data index /datasets/laion-sample",
        "pretrain data index '/datasets/imagenet/train-{0000..1023}.tar' --classes classes.txt",
    )
)
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
    print(_summary(index_shards(shards, classes=names, workers=workers or num_cores())))


@app.command(epilog=_examples("pretrain data verify data/cifar10/train"))
def verify(shards: Shards, max_pixels: MaxPixels = 50_000_000, workers: Workers = 0) -> None:
    """Reads everything: hashes, tar headers, indexes, counts; decodes every image. Names each fault."""
    from data_pipeline.errors import ShardError
    from data_pipeline.inspect.verify import verify as verify_shards
    from data_pipeline.parallel import num_cores

    found = verify_shards(shards, max_pixels=max_pixels, workers=workers or num_cores())
    for fault in found.faults:
        print(fault)
    if found.faults:
        raise ShardError(
            where=shards,
            expected="a dataset without a fault",
            found=f"{len(found.faults):,} (listed above)",
            fix="Copy the shards again, or make them again.",
        )
    size = f"{_shards(found.num_shards)}, {_megabytes(found.num_bytes)}"
    print(f"{shards}: sound; {found.num_samples:,} samples in {size}")


@app.command(epilog=_examples("pretrain data stats data/cifar10/train --out cifar10.png"))
def stats(
    shards: Shards,
    out: Annotated[Path, typer.Option("--out", metavar="PNG", help="The contact sheet to write.")] = Path(
        "contact_sheet.png"
    ),
    max_pixels: MaxPixels = 50_000_000,
) -> None:
    """Tells counts, sizes, classes and the histogram of labels; draws a contact sheet."""
    from data_pipeline.inspect.stats import stats as look_through

    found = look_through(shards, out, max_pixels=max_pixels)
    print("\n".join([_summary(found.manifest), *_sizes(found), *_histogram(found.manifest)]))
    print(f"contact sheet: {out}")


app.command(epilog=_examples(*label_commands.LABEL_EXAMPLES))(label_commands.label)
app.command(epilog=_examples(*label_commands.SELECT_EXAMPLES))(label_commands.select)


def _class_names(path: Path) -> list[str]:
    from data_pipeline.errors import DataError

    try:
        names = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(where=str(path), expected="a text file, one class name a line", found=str(error)) from error
    names = [name.strip() for name in names]
    while names and not names[-1]:
        names.pop()
    if not all(names) or not names:
        raise DataError(where=str(path), expected="a class name in every line", found="an empty one")
    return names


def _summary(manifest: Manifest) -> str:
    labels = "no labels"
    if manifest.label_counts is not None:
        labels = f"{len(manifest.classes or manifest.label_counts):,} classes"
    parts = [
        f"{manifest.total:,} samples",
        labels,
        _shards(len(manifest.names)),
        _megabytes(int(manifest.num_bytes.sum())),
        f"fields {' '.join(manifest.fields)}",
    ]
    return f"{manifest.root}: {', '.join(parts)}"


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
    """One line a class, with a bar."""
    if manifest.label_counts is None:
        return []
    names = manifest.classes or [str(label) for label in range(len(manifest.label_counts))]
    width = max(len(name) for name in names)
    most = max(int(manifest.label_counts.max()), 1)
    return [
        f"  {label:>5} {name:<{width}} {count:>9,} {'#' * round(40 * count / most)}"
        for label, (name, count) in enumerate(zip(names, manifest.label_counts.tolist(), strict=True))
    ]


def _shards(count: int) -> str:
    return "1 shard" if count == 1 else f"{count:,} shards"


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB"
