"""A few bytes of an image take neither gigabytes nor minutes: what a header declares is bounded before it is opened."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from data_pipeline.errors import SampleError
from data_pipeline.ingest.image_normalizer import ImageNormalizer
from tests.data_pipeline.test_decode import PHOTO, decode, encode

Tags = dict[int, tuple[int, int, int]]  # type, count and value, by the tag's number


def tiff(width: int, height: int, tags: Tags, twice: Tags | None = None) -> bytes:
    """A gray TIFF of one directory, little-endian; `twice` are tags that stand a second time."""
    every = {256: (4, 1, width), 257: (4, 1, height), 258: (3, 1, 8), 259: (3, 1, 8), 262: (3, 1, 1), 277: (3, 1, 1)}
    entries = sorted([*(every | tags).items(), *(twice or {}).items()])
    packed = b"".join(struct.pack("<HHII", tag, *rest) for tag, rest in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + packed + bytes(30)


def tiles(width: int, height: int) -> Tags:
    return {322: (4, 1, width), 323: (4, 1, height), 324: (4, 1, 8), 325: (4, 1, 30)}


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def many_chunks(kind: bytes, content: bytes, number: int) -> bytes:
    data = encode(PHOTO, "PNG")
    return data[:33] + chunk(kind, content) * number + data[33:]


GIF, GRAY_BMP = encode(PHOTO, "GIF"), encode(PHOTO.convert("L"), "BMP")
MANY_BLOCKS = b"\1a" * 30_000 + b"\0"
GREEDY = {
    "a tile": (tiff(1, 1, tiles(46_000, 46_000)), "tiles of 46,000 x 46,000"),
    "a tile of a second tag": (tiff(1, 1, tiles(16, 16), {322: (4, 1, 2**31 - 1)}), "tiles of 2,147,483,647"),
    "many tiles": (tiff(1, 60_000, tiles(65_536, 16)), "tiles of 65,536 x 16"),
    "tags that share their bytes": (tiff(1, 1, dict.fromkeys(range(40000, 40010), (1, 90000, 0))), "tags of"),
    "a comment": (b"P6\n#" + b"a" * 200_000 + b"\n2 2\n255\n" + bytes(12), "no whole header"),
    "comments among numbers": (b"P2\n200 200\n255\n" + b"#\n" * 50_000 + b"1 " * 40_000, "comments"),
    "chunks of a PNG": (many_chunks(b"abCd", b"", 20_000), "chunks"),
    "profiles of a PNG": (many_chunks(b"iCCP", b"a\0\0" + zlib.compress(bytes(10**6)), 300), "texts or profiles"),
    "blocks of a GIF": (GIF[:781] + b"!\xfe" + MANY_BLOCKS + GIF[781:], "blocks"),
    "blocks of a GIF behind a zero": (GIF[:781] + b"!\xfe\1\0\1," + MANY_BLOCKS + GIF[781:], "blocks"),
    "blocks of a GIF behind none": (GIF[:781] + b"!\xf9\0," + bytes(44) + MANY_BLOCKS + GIF[781:], "blocks"),
    "blocks of a GIF that loops": (
        GIF[:781] + b"!\xff\x0bNETSCAPE2.0\0," + bytes(44) + MANY_BLOCKS + GIF[781:],
        "blocks",
    ),
    "runs of a BMP": (
        GRAY_BMP[:18] + struct.pack("<ii", 7000, 7000) + GRAY_BMP[26:30] + struct.pack("<I", 1) + GRAY_BMP[34:],
        "pixels in runs",
    ),
}


@pytest.mark.parametrize("greedy", GREEDY)
def test_it_is_refused_for_what_it_declares(greedy: str) -> None:
    data, said = GREEDY[greedy]
    with pytest.raises(SampleError, match=said):
        decode(data, max_pixels=50_000_000)
    with pytest.raises(SampleError, match=said):  # as `data convert` looks at it, which decodes nothing
        ImageNormalizer(None, 50_000_000).member(data, "sample")


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"])
@pytest.mark.parametrize("big", [False, True])
def test_ordinary_ones_are_taken(compression: str, big: bool) -> None:
    data = encode(PHOTO, "TIFF", compression=compression, big_tiff=big)
    assert np.array_equal(decode(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_so_are_comments_texts_and_tiles_of_the_usual_size() -> None:
    assert decode(b"P3 # made by hand\n#again\n1 1\n255 1 # red\n 2 3\n").tolist() == [[[1, 2, 3]]]
    assert np.array_equal(decode(many_chunks(b"tEXt", b"Comment\0hello", 300)), np.asarray(PHOTO))
    loop, comment = b"!\xff\x0bNETSCAPE2.0\3\1\0\0\0", b"!\xfe" + (b"\xff" + b"," * 254 + b"\0") * 1000 + b"\0"
    assert np.array_equal(decode(GIF[:781] + loop + comment + GIF[781:]), decode(GIF))
    tiled = tiff(100, 60, tiles(512, 512) | {259: (3, 1, 1), 324: (4, 1, 0)})
    assert decode(tiled + bytes(512 * 512)).shape == (60, 100, 3)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF", "TIFF", "BMP"])
def test_what_is_cut_is_refused(kind: str) -> None:
    data = encode(PHOTO, kind)
    for share in (0.3, 0.6, 0.9):
        with pytest.raises(SampleError, match="sample"):
            decode(data[: int(share * len(data))])


def png(kind: int, depth: int, rows: bytes, transparent: bytes) -> bytes:
    """A PNG of one row."""
    width = len(rows) * 8 // depth // (3 if kind == 2 else 1)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, depth, kind, 0, 0, 0))
    body = chunk(b"tRNS", transparent) + chunk(b"IDAT", zlib.compress(b"\0" + rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + body


@pytest.mark.parametrize(
    ("data", "red"),
    [
        (png(0, 16, struct.pack(">4H", 0, 514, 513, 65535), struct.pack(">H", 514)), [0, 255, 2, 255]),
        (png(0, 8, bytes([0, 7, 9, 200]), struct.pack(">H", 7)), [0, 255, 9, 200]),
        (png(0, 4, bytes([0x05, 0x9F]), struct.pack(">H", 5)), [0, 255, 9 * 17, 255]),
        (png(0, 2, bytes([0b00011011]), struct.pack(">H", 1)), [0, 255, 170, 255]),
        (png(2, 16, struct.pack(">6H", 512, 0, 0, 2560, 0, 0), struct.pack(">3H", 2560, 0, 0)), [2, 255]),
    ],
)
def test_the_one_transparent_value_of_a_png_is_white(data: bytes, red: list[int]) -> None:
    assert decode(data)[0, :, 0].tolist() == red
