"""What is in a dataset: counts, sizes, classes, and a contact sheet to look at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from data_pipeline.datasets.read import ShardDataset
from data_pipeline.durable import durable_file
from data_pipeline.errors import FieldError, SampleError
from data_pipeline.glyphs import Run, in_fonts
from data_pipeline.order.spread import spread_over
from data_pipeline.progress import track
from data_pipeline.remote.config import DEFAULT, CacheConfig
from data_pipeline.samples.decode import decode_image
from data_pipeline.shards.index import CAPTION_FIELD, IMAGE_FIELDS, LABEL_FIELD
from data_pipeline.shards.load_manifest import load_manifest
from data_pipeline.shards.manifest import Manifest

SHEET_COLUMNS, SHEET_ROWS = 10, 8
THUMBNAIL, FONT_SIZE, LINE, GAP, MARGIN = 96, 10, 13, 4, 2  # pixels
MAX_LINES = 20  # of a caption; what is longer ends with …
_ROOM = THUMBNAIL - 2 * MARGIN


@dataclass(frozen=True)
class Stats:
    """What was found.

    Attributes:
        manifest: of the dataset.
        image_bytes: bytes of each image, [N].
        pixels: (width, height) of those on the contact sheet, [n, 2].
        left_out: why others, which were to be on it, cannot be shown.
    """

    manifest: Manifest
    image_bytes: NDArray[np.int64]
    pixels: NDArray[np.int64]
    left_out: tuple[SampleError, ...] = ()


def stats(spec: str, sheet: Path, *, max_pixels: int = 50_000_000, cache: CacheConfig = DEFAULT) -> Stats:
    """Look through the indexes of `spec` and write a contact sheet of images spread evenly over it.

    Args:
        spec: as `load_manifest` takes it.
        sheet: the PNG to write.
        max_pixels: an image of more is not decoded.
        cache: how shards behind a URL are fetched and kept.

    Raises:
        DataError: no dataset there, or a damaged one; SampleError where none of the images for the sheet can be shown.
        FieldError: it has no images.
    """
    manifest = load_manifest(spec, cache=cache)
    if not set(IMAGE_FIELDS) & set(manifest.fields) or not manifest.total:
        raise FieldError(
            where=str(manifest.root),
            expected=f"samples with an image ({', '.join(IMAGE_FIELDS)})",
            found=f"{manifest.total:,} samples with {', '.join(manifest.fields) or 'nothing'}",
        )
    num_shards = len(manifest.names)
    sizes = [_image_sizes(manifest, i) for i in track(range(num_shards), label="reading indexes", total=num_shards)]
    thumbnails, pixels, left_out = _thumbnails(manifest, max_pixels)
    if not thumbnails and left_out:
        raise left_out[0]
    with durable_file(sheet) as file:
        _sheet(thumbnails).save(file, format="PNG")
    return Stats(manifest, np.concatenate(sizes), np.array(pixels, dtype=np.int64), tuple(left_out))


def _image_sizes(manifest: Manifest, i: int) -> NDArray[np.int64]:
    index = manifest.index(i)
    columns = [column for column, field in enumerate(index.fields) if field in IMAGE_FIELDS]
    sizes = index.sizes[:, columns]
    return sizes[sizes > 0]


def _thumbnails(
    manifest: Manifest, max_pixels: int
) -> tuple[list[tuple[Image.Image, str]], list[tuple[int, int]], list[SampleError]]:
    """Images from all over the dataset, each with its caption; their sizes; and what of them does not decode."""
    dataset = ShardDataset(manifest)
    thumbnails, pixels, left_out = [], [], []
    for number in spread_over(manifest.total, SHEET_COLUMNS * SHEET_ROWS):
        sample = dataset.read(number)
        field = next((field for field in IMAGE_FIELDS if field in sample.fields), None)
        if field is None:
            continue
        try:
            decoded = decode_image(sample.fields[field], max_pixels=max_pixels, where=f"{sample.key}.{field}")
        except SampleError as error:
            left_out.append(error)
            continue
        image = Image.fromarray(decoded)
        pixels.append(image.size)
        scale = THUMBNAIL / max(image.size)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        thumbnails.append((image.resize(size), _caption(manifest, sample.fields)))
    return thumbnails, pixels, left_out


def _caption(manifest: Manifest, fields: Mapping[str, bytes]) -> str:
    """The class, or else the caption."""
    if LABEL_FIELD not in fields:
        return " ".join(fields.get(CAPTION_FIELD, b"").decode(errors="replace").split())
    number = int(fields[LABEL_FIELD])
    known = manifest.classes is not None and number < len(manifest.classes)
    return manifest.classes[number] if known and manifest.classes else str(number)


def _sheet(thumbnails: list[tuple[Image.Image, str]]) -> Image.Image:
    """Rows of thumbnails, each as high as its longest caption needs."""
    lines = [_wrapped(caption) for _, caption in thumbnails]
    starts = range(0, len(thumbnails), SHEET_COLUMNS)
    heights = [THUMBNAIL + LINE * max(map(len, lines[i : i + SHEET_COLUMNS])) + GAP for i in starts]
    sheet = Image.new("RGB", (SHEET_COLUMNS * THUMBNAIL, sum(heights)), "white")
    draw = ImageDraw.Draw(sheet)
    for k, ((image, _), own) in enumerate(zip(thumbnails, lines, strict=True)):
        row, column = divmod(k, SHEET_COLUMNS)
        x, y = column * THUMBNAIL, sum(heights[:row])
        sheet.paste(image, (x + (THUMBNAIL - image.width) // 2, y + (THUMBNAIL - image.height) // 2))
        for number, line in enumerate(own):
            at = float(x + MARGIN)
            for run in line:
                draw.text((at, y + THUMBNAIL + LINE * number), run.text, fill="black", font=_font(run.path))
                at += _font(run.path).getlength(run.text)
    return sheet


def _wrapped(caption: str) -> list[list[Run]]:
    """A caption in lines of a thumbnail's width, broken at spaces, or within what is longer than a line."""
    found, line = [], ""
    for word in caption.split(" "):
        if line and _width(f"{line} {word}") > _ROOM:
            found.append(line)
            line = ""
        line = f"{line} {word}" if line else word
        while _width(line) > _ROOM and len(line) > 1:
            fits = next(n for n in range(len(line) - 1, 0, -1) if n == 1 or _width(line[:n]) <= _ROOM)
            found.append(line[:fits])
            line = line[fits:]
    found.append(line)
    if len(found) > MAX_LINES:
        found = [*found[: MAX_LINES - 1], "…"]
    return [in_fonts(line) for line in found]


def _width(text: str) -> float:
    return sum(_font(run.path).getlength(run.text) for run in in_fonts(text))


@cache
def _font(path: Path) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, FONT_SIZE)
