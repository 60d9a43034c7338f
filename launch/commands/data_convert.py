"""`pretrain data convert`: images of any layout as shards."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launch.commands.data_arguments import MaxPixels, Out, ShardSize, Workers, summary
from launch.commands.option_groups import grouped

if TYPE_CHECKING:
    from data_pipeline.ingest.convert import Conversion, ConvertOptions
    from data_pipeline.ingest.tables import Columns

CONVERT_EXAMPLES = (
    "pretrain data convert cifar10.tar.gz data/cifar10 --split-by-folder",
    "pretrain data convert /datasets/imagenet/train data/imagenet/train --short-side 256 --workers 16",
    "pretrain data convert captions.csv data/coco --root /datasets/coco/train2017",
    "pretrain data convert birds.parquet data/birds --image-column file --label-column species",
    "pretrain data convert /downloads/laion data/laion --skip-bad",
    "pretrain data convert '/datasets/cc3m/{00000..00331}.tar' data/cc3m --caption-field json:caption",
)


@dataclass(frozen=True, kw_only=True)
class LayoutOptions:
    """How images are laid out in shards."""

    shard_size: ShardSize = 1000
    short_side: Annotated[
        int | None,
        typer.Option("--short-side", min=1, metavar="PX", help="Make larger images this small [bytes are kept]."),
    ] = None
    split_by_folder: Annotated[
        bool, typer.Option("--split-by-folder", help="Top folders (train, test, ...) become OUT/train, ...")
    ] = False
    shuffle: Annotated[bool, typer.Option("--shuffle/--no-shuffle", help="In a random order, or by name.")] = True
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of that order.")] = 0
    max_pixels: MaxPixels = 50_000_000

    def convert_options(self) -> ConvertOptions:
        from data_pipeline.ingest.convert import ConvertOptions

        return ConvertOptions(
            self.shard_size, self.short_side, self.split_by_folder, self.shuffle, self.seed, self.max_pixels
        )


@dataclass(frozen=True, kw_only=True)
class TableOptions:
    """The columns of a table, and where its paths begin."""

    root: Annotated[
        Path | None, typer.Option("--root", metavar="DIR", help="Table: where its paths begin [its own folder].")
    ] = None
    image_column: Annotated[
        str | None, typer.Option("--image-column", metavar="NAME", help="Table: paths [image, path, file_name, ...].")
    ] = None
    caption_column: Annotated[
        str | None, typer.Option("--caption-column", metavar="NAME", help="Table: captions [caption, text, ...].")
    ] = None
    label_column: Annotated[
        str | None,
        typer.Option("--label-column", metavar="NAME", help="Table: numbers or class names [label, class, cls]."),
    ] = None
    allow_outside: Annotated[
        bool, typer.Option("--allow-outside", help="Table: its paths may lead out of the root.")
    ] = False

    def columns(self) -> Columns | None:
        """Returns the columns that were named; None: none was."""
        from data_pipeline.ingest.tables import Columns

        given = Columns(self.image_column, self.caption_column, self.label_column, self.root, self.allow_outside)
        return None if given == Columns() else given


@grouped
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
    layout: LayoutOptions,
    table: TableOptions,
    caption_field: Annotated[
        str | None,
        typer.Option(
            "--caption-field",
            metavar="FIELD[:KEY]",
            help="Shards: member, or entry of a JSON one, to be txt [txt].",
        ),
    ] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out images that cannot be used, and say which.")
    ] = False,
    workers: Workers = 0,
) -> None:
    """Turns images into shards: of a folder, an archive, a table of files, or other WebDataset shards.

    Of a folder or an archive, folders inside are the classes, numbered by name. A table gives each image its
    caption, its label, or both. Shards, such as img2dataset writes, keep their members and are laid out anew.
    Nothing is unpacked or downloaded. Interrupted, it goes on when it is given again.
    """
    from data_pipeline.ingest.convert import convert as convert_images
    from data_pipeline.parallel import num_cores

    done = convert_images(
        source,
        out,
        layout.convert_options(),
        columns=table.columns(),
        caption_field=caption_field,
        skip_bad=skip_bad,
        workers=workers or num_cores(),
    )
    print("\n".join([*_left_out(done), *map(summary, done.manifests.values())]))


def _left_out(done: Conversion) -> Iterator[str]:
    """Yields what became of all that was in the source but in no data set, and how its folders were read."""
    from data_pipeline.datasets.file_names import count_by_suffix, is_hidden
    from data_pipeline.messages import short_list

    yield from (f"left out: {error}" for error in done.bad)
    if left_out := done.num_images - sum(manifest.total for manifest in done.manifests.values()):
        yield f"left out {left_out:,} bad {'image' if left_out == 1 else 'images'}"
    if done.others:
        shown = next((name for name in done.others if not is_hidden(name)), done.others[0])
        yield f"passed over, being no images: {count_by_suffix(done.others)}, such as {shown}"
    if done.without_images:
        yield f"left out the folders without images: {short_list(done.without_images)}"
    classes = next((manifest.classes for manifest in done.manifests.values() if manifest.classes), ())
    if done.shared:
        yield f"passed over {done.shared}, which all images share" + ("; no class folders" if not classes else "")
    counts = [manifest.label_counts for manifest in done.manifests.values() if manifest.label_counts is not None]
    if missing := [name for i, name in enumerate(classes) if not any(count[i : i + 1].any() for count in counts)]:
        yield f"classes without an image now: {short_list(missing)}"
