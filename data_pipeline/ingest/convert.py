"""An image folder or an archive of one, a table, or other shards -> shards, in a keyed random order."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_pipeline.datasets.folders import KINDS, Entry, Reader, open_source
from data_pipeline.datasets.layout import read_layout
from data_pipeline.errors import SampleError, SourceError
from data_pipeline.ingest.image_normalizer import ImageNormalizer
from data_pipeline.ingest.layout import arrange
from data_pipeline.ingest.reshard import are_shards, open_shards
from data_pipeline.ingest.table_rows import is_table
from data_pipeline.ingest.tables import Columns, open_table
from data_pipeline.local_paths import url_scheme
from data_pipeline.order import keyed
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.row_store import StoredRows
from data_pipeline.shards.write import Record, check_output, split_evenly, write_dataset


@dataclass(frozen=True)
class ConvertOptions:
    """What decides the bytes of a conversion, besides the source.

    Attributes:
        shard_size: at most so many samples per shard; shards are of equal size to within one.
        short_side: images whose shorter side is longer become this small, as JPEG; None: bytes are kept.
        split_by_folder: the top folders (train, test, ...) become datasets of their own.
        shuffle: lay samples in a keyed random order, as readers shuffle only nearby samples; else by name.
        seed: of that order.
        max_pixels: an image of more counts as bad.
    """

    shard_size: int = 1000
    short_side: int | None = None
    split_by_folder: bool = False
    shuffle: bool = True
    seed: int = 0
    max_pixels: int = 50_000_000


@dataclass(frozen=True)
class Conversion:
    """What came of it.

    Attributes:
        manifests: of each dataset made, by its folder.
        num_images: found in the source; rows of a table, samples of shards. Bad ones too.
        others: names of the files in the source that are no images.
        shared: the folders that all images share, which were passed over.
        without_images: folders beside the class folders that hold no image, which became no classes.
        bad: images left out, with the reason; of those shards that were made this time.
    """

    manifests: dict[Path, Manifest]
    num_images: int
    bad: tuple[SampleError, ...]
    others: Sequence[str] = ()
    shared: str = ""
    without_images: Sequence[str] = ()


class Item(NamedTuple):
    """One sample to be written."""

    key: str
    label: int | None
    entry: Entry


def convert(
    path: Path,
    out: Path,
    options: ConvertOptions,
    *,
    columns: Columns | None = None,
    caption_field: str | None = None,
    skip_bad: bool = False,
    workers: int = 1,
) -> Conversion:
    """Make shards in `out` of what is at `path`.

    An image folder, or a zip, tar or tar.gz of one: folders that all images share are passed over; of what
    remains, the first folder is the class, and classes are numbered by name; images in no folder have no label.
    A CSV, TSV or Parquet table of paths with captions or labels: see tables.py. A folder with tars at its top or a
    brace pattern of tars: WebDataset shards, see reshard.py.

    Args:
        columns: of a table.
        caption_field: of shards; `FIELD` or `FIELD:KEY`.
        skip_bad: leave out images that cannot be used; else they end the conversion.
        workers: processes; their number changes nothing in the result.

    Raises:
        SourceError: the source, or images in it, cannot be used; an option that is not for this kind of source.
        DataError: `out` holds something else; shards are damaged.
        RunError: a file could not be written.
    """
    _check_options(path, options, columns, caption_field)
    normalizer, temporary_folder = ImageNormalizer(options.short_side, options.max_pixels), _nearest_folder(out)
    if is_table(path):
        rows = open_table(path, columns or Columns(), normalizer, temporary_folder)
    elif are_shards(path):
        rows = open_shards(path, caption_field, normalizer, temporary_folder, workers=workers)
    else:
        return _convert_images(path, out, options, normalizer, skip_bad=skip_bad, workers=workers)
    return _convert_rows(rows, out, options, skip_bad=skip_bad, workers=workers)


def _check_options(path: Path, options: ConvertOptions, columns: Columns | None, caption_field: str | None) -> None:
    if url_scheme(path):
        fix = "Copy it to a local folder; lists of URLs are img2dataset's to download."
        raise SourceError(where=str(path), expected=KINDS, found="a URL", fix=fix)
    table = is_table(path)
    shards = not table and are_shards(path)
    for name, given, fits, kind in (
        ("--split-by-folder", options.split_by_folder, not table and not shards, "an image folder or an archive"),
        ("--root, --allow-outside and --...-column", columns is not None, table, "a table (.csv, .tsv, .parquet)"),
        ("--caption-field", caption_field is not None, shards, "WebDataset shards (a folder of tars, a pattern)"),
    ):
        if given and not fits:
            raise SourceError(where=name, expected=kind, found=str(path), fix="Leave the option out.")


def _convert_rows(rows: StoredRows, out: Path, options: ConvertOptions, *, skip_bad: bool, workers: int) -> Conversion:
    items = rows.store.offsets
    if options.shuffle:
        items = array("q", np.frombuffer(items, np.int64)[_permutation(len(items), options.seed)].tobytes())
    plan = {"made_by": "convert 1", "source": rows.store.identity, **rows.plan, **asdict(options)}
    manifest, bad = write_dataset(
        out,
        plan,
        split_evenly(items, options.shard_size),
        rows.producer,
        classes=rows.classes,
        skip_bad=skip_bad,
        workers=workers,
        label="converting",
    )
    return Conversion({out: manifest}, len(items), bad)


def _convert_images(
    path: Path, out: Path, options: ConvertOptions, normalizer: ImageNormalizer, *, skip_bad: bool, workers: int
) -> Conversion:
    source = open_source(path, _nearest_folder(out))
    names = [entry.name for entry in source.images]
    layout = read_layout(names, source.others, path, split_by_folder=options.split_by_folder)
    if not skip_bad:
        layout.check_classes(path, layout.empty, "; or give --skip-bad, which leaves them out")
    splits = arrange(layout)
    plans = {}
    for split in splits:
        plans[split] = {"made_by": "convert 1", "source": source.identity, "split": split, **asdict(options)}
        check_output(out / split, plans[split])
    producer = ImageProducer(source.reader, normalizer)
    manifests: dict[Path, Manifest] = {}
    bad: list[SampleError] = []
    for split, (numbers, keys, labels) in splits.items():
        items = [Item(key, label, source.images[i]) for i, key, label in zip(numbers, keys, labels, strict=True)]
        if options.shuffle:
            items = [items[i] for i in _permutation(len(items), options.seed).tolist()]
        manifests[out / split], left_out = write_dataset(
            out / split,
            plans[split],
            split_evenly(items, options.shard_size),
            producer,
            classes=layout.classes if any(label is not None for label in labels) else None,
            skip_bad=skip_bad,
            workers=workers,
            label=f"converting {split}".strip(),
        )
        bad.extend(left_out)
    others = [name for name in source.others if not name.endswith("/")]
    return Conversion(manifests, len(source.images), tuple(bad), others, layout.shared, layout.empty)


@dataclass(frozen=True)
class ImageProducer:
    """Images of a folder or archive, with the labels that their folders are."""

    reader: Reader
    normalizer: ImageNormalizer

    def produce(self, items: Sequence[Item]) -> Iterator[Record | SampleError]:
        for item in items:
            try:
                extension, data = self.normalizer.member(self.reader.read(item.entry), item.entry.name)
            except SampleError as error:
                yield error
                continue
            members = {extension: data}
            if item.label is not None:
                members["cls"] = str(item.label).encode()
            yield item.key, members


def _permutation(size: int, seed: int) -> NDArray[np.int64]:
    return keyed.permute(np.arange(size, dtype=np.int64), np.array([size]), keyed.key_of(seed))


def _nearest_folder(out: Path) -> Path:
    """The folder that is, or will hold, `out`'s first missing parent: nothing may be made before it is
    checked."""
    return next(parent for parent in out.absolute().parents if parent.is_dir())
