"""What an image file declares, held against its size and its pixels before Pillow opens it.

A few bytes can ask a decoder for gigabytes or minutes without many pixels: tiles far larger than the image, tags that
share one long value, comments that are read a byte at a time. Each is refused by numbers read from the header.
"""

from __future__ import annotations

import re
import struct
from math import prod

MIN_TILED_PIXELS = 2**24  # that tiles may cover of any TIFF; of larger ones, four times the image
MAX_TAGS, MAX_HEADER_BYTES, MAX_COMMENTS, MAX_BLOCKS, MAX_TEXTS = 4096, 65536, 1000, 20_000, 256

_SPACE, _TOKEN = rb"(?:\s|#[^\r\n]*[\r\n])+", rb"[^\s#]{1,32}"
_NETPBM = re.compile(
    rb"P(?:[14](?:%(space)s%(token)s){2}|[2356fF](?:%(space)s%(token)s){3})\s" % {b"space": _SPACE, b"token": _TOKEN}
)
_TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_COMMENT, _APPLICATION = 0xFE, 0xFF  # extensions of a GIF
_WIDTH, _HEIGHT, _TILE_WIDTH, _TILE_HEIGHT = 256, 257, 322, 323


class UnboundedError(ValueError):
    """A file that may take more memory or time than its pixels are worth; the message says by what."""


def check_bounds(data: bytes) -> None:
    """Raises UnboundedError, or struct.error where a header is cut short; passes what it does not know."""
    if data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        _check_tiff(data)
    elif data[:8] == b"\x89PNG\r\n\x1a\n":
        _check_png(data)
    elif data[:3] == b"GIF":
        _check_gif(data)
    elif data[:2] == b"BM":
        _check_bmp(data)
    elif re.match(rb"P[1-6fF]\s", data):
        _check_netpbm(data)


def _check_tiff(data: bytes) -> None:
    """Looks at the first directory alone. Where a tag stands twice, the greatest counts, as readers differ."""
    order, big = ("<" if data[:1] == b"I" else ">"), 43 in (data[2], data[3])
    count, entry, value, inline = ("Q", "HHQ", "Q", 8) if big else ("H", "HHI", "I", 4)
    (at,) = struct.unpack_from(f"{order}{value}", data, 8 if big else 4)
    (num_tags,) = struct.unpack_from(f"{order}{count}", data, at)
    if num_tags > MAX_TAGS:
        raise UnboundedError(f"{num_tags:,} tags")
    at += struct.calcsize(f"={count}")
    sizes: dict[int, list[int]] = {tag: [] for tag in (_WIDTH, _HEIGHT, _TILE_WIDTH, _TILE_HEIGHT)}
    num_bytes = 0
    for _ in range(num_tags):
        tag, kind, length = struct.unpack_from(f"{order}{entry}", data, at)
        at += struct.calcsize(f"={entry}")
        num_bytes += length * _TYPE_BYTES.get(kind, 1)
        if tag in sizes:
            form = {1: "B", 3: "H", 4: "I", 16: "Q"}.get(kind)
            if form is None or length != 1 or struct.calcsize(f"={form}") > inline:
                raise UnboundedError(f"tag {tag}, a size, is no single number")
            sizes[tag] += struct.unpack_from(f"{order}{form}", data, at)
        at += inline
    if num_bytes > 2 * len(data) + MAX_HEADER_BYTES:
        raise UnboundedError(f"tags of {num_bytes:,} bytes in a file of {len(data):,}")
    image = [max(sizes[tag], default=0) for tag in (_WIDTH, _HEIGHT)]
    tile = [max(sizes[tag], default=0) for tag in (_TILE_WIDTH, _TILE_HEIGHT)]
    covered = prod(-(-side // max(1, of_tile)) * of_tile for side, of_tile in zip(image, tile, strict=True))
    if covered > max(MIN_TILED_PIXELS, 4 * prod(image)):
        raise UnboundedError(f"tiles of {tile[0]:,} x {tile[1]:,} for an image of {image[0]:,} x {image[1]:,}")


def _check_png(data: bytes) -> None:
    """Its chunks are read one by one, and texts and profiles unpacked, each up to a MiB."""
    at, num_chunks, num_texts = 8, 0, 0
    most = 1000 + len(data) // 256
    while at + 8 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        num_chunks += 1
        num_texts += data[at + 4 : at + 8] in (b"zTXt", b"iTXt", b"iCCP")
        at += 12 + length
        if num_chunks > most or num_texts > MAX_TEXTS:
            raise UnboundedError(f"more than {min(num_chunks, most):,} chunks, {num_texts} of them texts or profiles")


def _check_gif(data: bytes) -> None:
    """Looks at what stands before its first image, in blocks of up to 255 bytes, and finds its way as Pillow does.

    An empty block ends an extension: of a comment the first one, of others the first one behind the block that says
    what it is, or behind the two of a loop.
    """
    at = 13 + (3 << (data[10] & 7) + 1 if len(data) > 10 and data[10] & 128 else 0)
    num_blocks = 0
    while at + 1 < len(data) and data[at] not in b",;":
        label, at = (data[at + 1], at + 2) if data[at] == ord("!") else (None, at + 1)
        looping = (
            label == _APPLICATION and at < len(data) and data[at] >= 11 and data.startswith(b"NETSCAPE2.0", at + 1)
        )
        said = 0 if label == _COMMENT else 2 if looping else 1  # blocks that may be empty without ending it
        open_, num_blocks = label is not None, num_blocks + 1
        while open_ and at < len(data):
            open_ = said > 0 or data[at] > 0
            at, said, num_blocks = at + 1 + data[at], said - 1, num_blocks + 1
        if num_blocks > MAX_BLOCKS:
            raise UnboundedError(f"more than {MAX_BLOCKS:,} blocks before its first image")


def _check_bmp(data: bytes) -> None:
    """Runs of at most 255 pixels in two bytes; lines that end early are filled a pixel at a time."""
    (size_of_header,) = struct.unpack_from("<I", data, 14)
    if size_of_header < 40:  # an old one, which knows no runs
        return
    width, height, compression = *struct.unpack_from("<ii", data, 18), *struct.unpack_from("<I", data, 30)
    if compression in (1, 2) and abs(width * height) > 2**20 + 128 * len(data):
        raise UnboundedError(f"{abs(width * height):,} pixels in runs of {len(data):,} bytes")


def _check_netpbm(data: bytes) -> None:
    """Its header is read a byte at a time; of plain numbers each comment is cut out of a whole block."""
    if _NETPBM.match(data, 0, MAX_HEADER_BYTES) is None:
        raise UnboundedError(f"no whole header in its first {MAX_HEADER_BYTES:,} bytes")
    if data[1:2] in b"123" and data.count(b"#") > MAX_COMMENTS:
        raise UnboundedError(f"more than {MAX_COMMENTS:,} comments")
