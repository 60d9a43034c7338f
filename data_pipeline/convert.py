"""An image folder, or an archive of one -> shards: names into splits, classes and keys, and a keyed
shuffle."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import Image

from data_pipeline import keyed
from data_pipeline.decode import FORMATS, decode_image
from data_pipeline.errors import SampleError
from data_pipeline.layout import arrange
from data_pipeline.manifest import Manifest
from data_pipeline.sources import Entry, Reader, open_source
from data_pipeline.write import Record, check_output, split_evenly, write_dataset

EXTENSIONS = {
    "JPEG": "jpg",
    "MPO": "jpg",
    "PNG": "png",
    "WEBP": "webp",
    "BMP": "bmp",
    "GIF": "gif",
    "PPM": "ppm",
    "TIFF": "tiff",
}
JPEG_QUALITY = 95  # of what is made smaller; the loss is below what one more resize does


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
        num_images: found in the source.
        num_others: files in the source that are no images.
        bad: images left out, with the reason; of those shards that were made this time.
    """

    manifests: dict[Path, Manifest]
    num_images: int
    num_others: int
    bad: tuple[SampleError, ...]


class Item(NamedTuple):
    """One sample to be written."""

    key: str
    label: int | None
    entry: Entry


def convert(path: Path, out: Path, options: ConvertOptions, *, skip_bad: bool = False, workers: int = 1) -> Conversion:
    """Make shards in `out` of the images in `path`: a folder, zip, tar or tar.gz.

    Folders that all images share are passed over; of what remains, the first folder is the class, and classes
    are numbered by name. Images that lie in no folder have no label.

    Args:
        skip_bad: leave out images that cannot be used; else they end the conversion.
        workers: processes; their number changes nothing in the result.

    Raises:
        SourceError: the source, or images in it, cannot be used.
        DataError: `out` holds something else.
        RunError: a file could not be written.
    """
    source = open_source(path, _nearest_folder(out))
    splits, classes = arrange([entry.name for entry in source.images], options.split_by_folder, path)
    plans = {}
    for split in splits:
        plans[split] = {"made_by": "convert 1", "source": source.identity, "split": split, **asdict(options)}
        check_output(out / split, plans[split])
    producer = ImageProducer(source.reader, options.short_side, options.max_pixels)
    manifests: dict[Path, Manifest] = {}
    bad: list[SampleError] = []
    for split, (numbers, keys, labels) in splits.items():
        items = [Item(key, label, source.images[i]) for i, key, label in zip(numbers, keys, labels, strict=True)]
        if options.shuffle:
            items = [items[i] for i in _permutation(len(items), options.seed)]
        manifests[out / split], left_out = write_dataset(
            out / split,
            plans[split],
            split_evenly(items, options.shard_size),
            producer,
            classes=classes if any(label is not None for label in labels) else None,
            skip_bad=skip_bad,
            workers=workers,
            label=f"converting {split}".strip(),
        )
        bad.extend(left_out)
    return Conversion(manifests, len(source.images), source.num_others, tuple(bad))


@dataclass(frozen=True)
class ImageProducer:
    """Images as they lie in the source, each header looked at; or made smaller."""

    reader: Reader
    short_side: int | None
    max_pixels: int

    def produce(self, items: Sequence[Item]) -> Iterator[Record | SampleError]:
        for item in items:
            try:
                members = self._image(item.entry)
            except SampleError as error:
                yield error
                continue
            if item.label is not None:
                members["cls"] = str(item.label).encode()
            yield item.key, members

    def _image(self, entry: Entry) -> dict[str, bytes]:
        data = self.reader.read(entry)
        extension, size = image_header(data, entry.name)
        if size[0] * size[1] > self.max_pixels:
            raise SampleError(
                where=entry.name,
                expected=f"at most {self.max_pixels:,} pixels",
                found=f"{size[0]} x {size[1]} pixels",
            )
        if self.short_side is None or min(size) <= self.short_side:
            return {extension: data}
        return {"jpg": _smaller(data, self.short_side, self.max_pixels, entry.name)}


def image_header(data: bytes, where: str) -> tuple[str, tuple[int, int]]:
    """(extension of the format it is in, (width, height)) from the header alone; raises SampleError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                return EXTENSIONS[image.format or ""], image.size
    except (OSError, ValueError, SyntaxError, KeyError, Image.DecompressionBombError) as error:
        raise SampleError(
            where=where, expected="an image", found=f"{len(data)} bytes that are none ({error})"
        ) from error


def _smaller(data: bytes, short_side: int, max_pixels: int, where: str) -> bytes:
    image = Image.fromarray(decode_image(data, max_pixels=max_pixels, where=where))
    scale = short_side / min(image.size)
    size = (max(short_side, round(image.width * scale)), max(short_side, round(image.height * scale)))
    pixels = np.asarray(image.resize(size, Image.Resampling.BICUBIC))
    encoded: bytes = simplejpeg.encode_jpeg(pixels, quality=JPEG_QUALITY, colorsubsampling="420")
    return encoded


def _permutation(size: int, seed: int) -> list[int]:
    slots = np.arange(size, dtype=np.int64)
    order: list[int] = keyed.permute(slots, np.array([size]), keyed.key_of(seed)).tolist()
    return order


def _nearest_folder(out: Path) -> Path:
    """The folder that is, or will hold, `out`'s first missing parent: nothing may be made before it is
    checked."""
    return next(parent for parent in out.absolute().parents if parent.is_dir())
