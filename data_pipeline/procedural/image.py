"""What procedural images share: their random streams, soft backgrounds, and JPEG."""

from __future__ import annotations

import zlib

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]  # [H, W, 3]

_QUALITY = 95  # JPEG as most real data are, so that decoding costs what it costs there; full color resolution


def generator(kind: str, split: str, seed: int, i: int) -> np.random.Generator:
    """The random stream of sample i: no other sample, split or seed has it, whoever makes the sample."""
    return np.random.default_rng([zlib.crc32(f"{kind} {split}".encode()), seed, i])


def smooth_field(rng: np.random.Generator, size: int, cells: int) -> NDArray[np.float64]:
    """Colors in [0, 1] that change slowly from cell to cell of a random grid, [size, size, 3]."""
    small = (rng.random((cells, cells, 3)) * 255).astype(np.uint8)
    return np.asarray(Image.fromarray(small).resize((size, size), Image.Resampling.BICUBIC)) / 255.0


def encode(image: Pixels) -> bytes:
    """As JPEG."""
    data: bytes = simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality=_QUALITY, colorsubsampling="444")
    return data
