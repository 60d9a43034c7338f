"""Pictures as they lie on people's disks, in known numbers: in class folders, and in tars as img2dataset writes them.

All are cut out of real photographs, no two alike. What should become of each follows from its kind.
"""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]  # [H, W, 3]
CLASSES = ("African grey", "Straße", "carpenter's kit", "eft", "garter_snake", "pickup", "tennis-ball", "v1.5 vacuum")


class Fate(Enum):
    """What should become of a picture."""

    TAKEN = "taken"
    HALF = "half"  # its header is sound, so that only decoding it tells
    SILENT = "without a caption"  # the picture is whole, and of use where captions are not asked for
    REFUSED = "refused"  # its first bytes say that it cannot be used


@dataclass(frozen=True)
class Kind:
    """Pictures of one making.

    Attributes:
        count: how many of them there are.
        suffix: of their files.
        encode: pixels -> the bytes of a file.
        fate: what should become of each.
        loss: by how many levels decoded pixels may differ from `shown(pixels)`, in the mean.
        shown: what a viewer sees of the pixels that were given.
    """

    count: int
    suffix: str
    encode: Callable[[Pixels], bytes]
    fate: Fate = Fate.TAKEN
    loss: float = 0.0
    shown: Callable[[Pixels], Pixels] = lambda pixels: pixels


@dataclass(frozen=True)
class Picture:
    """One file."""

    name: str
    kind: str
    label: str
    number: int
    data: bytes


def saved(form: str, mode: str = "RGB", **options: Any) -> Callable[[Pixels], bytes]:
    def encode(pixels: Pixels) -> bytes:
        file = io.BytesIO()
        Image.fromarray(pixels).convert(mode).save(file, form, **options)
        return file.getvalue()

    return encode


def png16(channels: int, pixels: Pixels) -> bytes:
    """16 bits a value, which Pillow writes of gray alone; the low byte is noise."""
    values = pixels[..., :channels].astype(np.uint16) * 256
    values += np.random.default_rng(int(pixels[0, 0, 0])).integers(0, 256, values.shape, np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", *pixels.shape[1::-1], 16, {1: 0, 3: 2}[channels], 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in ((b"IHDR", header), (b"IDAT", zlib.compress(rows, 1)), (b"IEND", b""))
    )


def glass(pixels: Pixels) -> bytes:
    """A PNG whose left half is transparent."""
    alpha = np.full((*pixels.shape[:2], 1), 255, np.uint8)
    alpha[:, : pixels.shape[1] // 2] = 0
    file = io.BytesIO()
    Image.fromarray(np.concatenate([pixels, alpha], 2)).save(file, "PNG", compress_level=1)
    return file.getvalue()


def over_white(pixels: Pixels) -> Pixels:
    return np.where(np.arange(pixels.shape[1])[:, None] < pixels.shape[1] // 2, 255, pixels).astype(np.uint8)


def gray(pixels: Pixels) -> Pixels:
    return np.array(Image.fromarray(pixels).convert("L").convert("RGB"))


def red_as_gray(pixels: Pixels) -> Pixels:
    return np.repeat(pixels[..., :1], 3, 2)


def heic(pixels: Pixels) -> bytes:
    """As a telephone begins one; Pillow writes none."""
    boxes = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0\0\0\x0cmeta\0\0\0\0"
    return boxes + struct.pack(">I", 8 + pixels.size) + b"mdat" + pixels.tobytes()


def page(pixels: Pixels) -> bytes:
    return b"<!DOCTYPE html><title>404 Not Found</title>" + pixels.tobytes()[:64].hex().encode()


def halved(whole: Callable[[Pixels], bytes], end: Callable[[int], bytes], pixels: Pixels) -> bytes:
    """Cut in the middle of what follows the first headers, and ended with `end(bytes that are missing)`."""
    data = whole(pixels)
    start = max(data.find(b"\xff\xda"), 64)
    cut = (start + len(data)) // 2
    return data[:cut] + end(len(data) - cut)


JPEG, PROGRESSIVE = saved("JPEG", quality=92), saved("JPEG", quality=92, progressive=True)
PNG, WEBP = saved("PNG", compress_level=1), saved("WEBP", quality=90, method=0)
AVIF = saved("AVIF", quality=90, speed=10)
CMYK = saved("JPEG", "CMYK", quality=92)
cut, closed, zeros = (lambda _: b""), (lambda _: b"\xff\xd9"), (lambda missing: bytes(missing))

FOLDER = {
    "baseline": Kind(300, ".jpg", JPEG, loss=12),
    "upper case": Kind(60, ".JPG", JPEG, loss=12),
    "jfif": Kind(50, ".jfif", JPEG, loss=12),
    "JPEG": Kind(40, ".JPEG", JPEG, loss=12),
    "progressive": Kind(120, ".jpg", PROGRESSIVE, loss=12),
    "inks": Kind(60, ".jpg", CMYK, loss=12),
    "gray": Kind(30, ".jpg", saved("JPEG", "L", quality=92), loss=12, shown=gray),
    "png": Kind(90, ".png", PNG),
    "glass": Kind(20, ".png", glass, shown=over_white),
    "16-bit gray": Kind(40, ".png", partial(png16, 1), loss=1, shown=red_as_gray),
    "16-bit": Kind(20, ".PNG", partial(png16, 3), loss=1),
    "webp": Kind(50, ".webp", WEBP, loss=12),
    "avif": Kind(30, ".avif", AVIF, loss=12),
    "cut": Kind(20, ".jpg", partial(halved, JPEG, cut), Fate.HALF),
    "cut and closed": Kind(15, ".jpg", partial(halved, JPEG, closed), Fate.HALF),
    "a tail of zeros": Kind(5, ".JPG", partial(halved, JPEG, zeros), Fate.HALF),
    "half progressive": Kind(5, ".jpg", partial(halved, PROGRESSIVE, closed), Fate.HALF),
    "half png": Kind(5, ".png", partial(halved, PNG, cut), Fate.HALF),
    "half webp": Kind(5, ".webp", partial(halved, WEBP, cut), Fate.REFUSED),
    "heic": Kind(16, ".heic", heic, Fate.REFUSED),
    "HEIC": Kind(4, ".HEIC", heic, Fate.REFUSED),
    "heic called jpg": Kind(5, ".jpg", heic, Fate.REFUSED),
    "a page": Kind(5, ".jpg", page, Fate.REFUSED),
    "empty": Kind(5, ".jpg", lambda _: b"", Fate.REFUSED),
}
# img2dataset that is told not to resize keeps the bytes of any format under the name .jpg.
TARS = {
    "baseline": Kind(130, ".jpg", JPEG, loss=12),
    "without a caption": Kind(10, ".jpg", JPEG, Fate.SILENT),
    "progressive": Kind(40, ".jpg", PROGRESSIVE, loss=12),
    "png": Kind(16, ".jpg", PNG),
    "webp": Kind(16, ".jpg", WEBP, loss=12),
    "avif": Kind(8, ".jpg", AVIF, loss=12),
    "cut and closed": Kind(12, ".jpg", partial(halved, JPEG, closed), Fate.HALF),
    "heic called jpg": Kind(8, ".jpg", heic, Fate.REFUSED),
}
STRANGERS = {
    "README.txt": b"photographs",
    "list.json": b"[]",
    "eft/Thumbs.db": b"\xd0\xcf\x11\xe0",
    "eft/.DS_Store": b"\0\0\0\1",
    "eft/._IMG_0001.jpg": b"\0\5\x16\7",
    "pickup/clip.mp4": b"\0\0\0\x18ftypisom\0\0\0\0",
}


class Photographs:
    """What pictures are cut out of."""

    def __init__(self, tar: Path) -> None:
        with tarfile.open(tar) as archive:
            files = [archive.extractfile(member) for member in archive if member.isfile()]
            self._photos = [np.array(Image.open(file).convert("RGB")) for file in files if file is not None]

    def cut_out(self, number: int) -> Pixels:
        """Picture `number`: at most 160 pixels a side, of one photograph and at a place of its own."""
        photo = self._photos[number % len(self._photos)]
        rng = np.random.default_rng(number)
        height, width = np.minimum(rng.integers(96, 161, 2), photo.shape[:2])
        top, left = rng.integers(0, photo.shape[0] - height + 1), rng.integers(0, photo.shape[1] - width + 1)
        return np.ascontiguousarray(photo[top : top + height, left : left + width])


def drawn(photographs: Photographs, kinds: Mapping[str, Kind], first: int) -> list[Picture]:
    """Every picture of the kinds, mixed; numbered from `first` on and named by its class and number."""
    names = [kind for kind, it in kinds.items() for _ in range(it.count)]
    order = np.random.default_rng(first).permutation(len(names))
    pictures = []
    for number, place in enumerate(order.tolist(), first):
        kind, label = names[place], CLASSES[number % len(CLASSES)]
        stem = (f"IMG_{number:04d}", f"my photo ({number})", f"2024.07.{number}", f"ünter {number}")[number // 8 % 4]
        data = kinds[kind].encode(photographs.cut_out(number))
        pictures.append(Picture(f"{label}/{stem}{kinds[kind].suffix}", kind, label, number, data))
    return pictures


def write_folder(folder: Path, pictures: Sequence[Picture]) -> None:
    """Class folders, with what else lies in such folders, and a class folder that nothing was put into."""
    for name, data in {**{picture.name: picture.data for picture in pictures}, **STRANGERS}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    (folder / "zebra").mkdir()


def caption(number: int) -> str:
    """With what a table has to quote; some are of two lines."""
    return f'a "{CLASSES[number % len(CLASSES)]}", no. {number};' + (
        " said,\nand more" if number % 5 == 0 else " naïve"
    )


def write_tars(folder: Path, pictures: Sequence[Picture], *, start_again: bool) -> dict[str, Picture]:
    """Two shards with image, caption and record, and beside each its table and its statistics, as img2dataset has them.

    Args:
        start_again: keys are counted from 0 in each tar; else they begin with the number of theirs.

    Returns:
        The pictures by `TAR/KEY`.
    """
    folder.mkdir()
    placed = {}
    for shard in range(2):
        name = f"{shard:05d}"
        with tarfile.open(folder / f"{name}.tar", "w") as tar:
            for i, picture in enumerate(pictures[shard::2]):
                key = f"{i:09d}" if start_again else f"{name}{2 * i:04d}"  # a download that failed leaves a gap
                placed[f"{name}.tar/{key}"] = picture
                text = "" if TARS[picture.kind].fate is Fate.SILENT else caption(picture.number)
                record = {"key": key, "status": "success", "caption": text, "width": 128, "exif": "{}"}
                for field, data in (
                    ("jpg", picture.data),
                    ("txt", text.encode()),
                    ("json", json.dumps(record, indent=4).encode()),
                ):
                    member = tarfile.TarInfo(f"{key}.{field}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        (folder / f"{name}.parquet").write_bytes(b"PAR1")
        (folder / f"{name}_stats.json").write_text('{"count": 130}')
    return placed
