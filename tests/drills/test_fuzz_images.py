"""Ten thousand damaged images of every format that is read: a picture or our own error, in bounded memory and time.

The examples are the same in every run. What Pillow's and libjpeg-turbo's own C code maps without using is no matter;
what stays resident after the greediest of them is.
"""

from __future__ import annotations

import io
import random
import resource
import time
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image, features

from data_pipeline.errors import SampleError
from data_pipeline.samples.decode import FORMATS, decode_image
from tests.data_pipeline.test_image_bounds import tiff, tiles

NUM_MUTATIONS = 10_000
MAX_PIXELS = 10**6
CPU_SECONDS = 5.0  # of any one; the greedy ones took 4 to 21, and one that is refused takes milliseconds
GROWTH = 300 * 2**20  # bytes of resident memory over all of them; the greedy ones took 2 GB and more
PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)).resize((96, 64), 3)
WORDS = [b"\xff\xff\xff\x7f", bytes(4), b"\xff" * 4, b"\0\1\0\0", b"\xff\xff", b"\0\0", b"\xff\x7f", b"\xff\xd9", b"#"]


def encode(kind: str, mode: str = "RGB", **options: Any) -> bytes:
    file = io.BytesIO()
    PHOTO.convert(mode).save(file, kind, **options)
    return file.getvalue()


def sound() -> dict[str, bytes]:
    plain = b"P3\n#a\n8 6 255\n" + b" ".join(b"%d" % (i % 256) for i in range(144))
    images = {
        "jpeg": encode("JPEG"),
        "progressive": encode("JPEG", progressive=True),
        "inks": encode("JPEG", "CMYK"),
        "inks, one finer": encode("JPEG", "CMYK", subsampling=2),
        "png": encode("PNG"),
        "palette": encode("PNG", "P", transparency=0),
        "webp": encode("WEBP"),
        "lossless webp": encode("WEBP", lossless=True),
        "gif": encode("GIF"),
        "bmp": encode("BMP"),
        "ppm": encode("PPM"),
        "plain": plain,
        "tiff": encode("TIFF"),
        "tiles": tiff(64, 64, tiles(64, 64)),
    }
    images |= {f"tiff {name}": encode("TIFF", compression=name) for name in ("tiff_lzw", "jpeg", "packbits")}
    if "AVIF" in FORMATS and features.check("avif"):
        images["avif"] = encode("AVIF")
    return images


def mutated(data: bytes, draw: random.Random) -> bytes:
    """One to four changes, half of them among the first bytes, where headers are."""
    changed = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(1 + min(len(changed), draw.choice([64, 400, 10**6])))
        length = draw.randrange(1, 60)
        match draw.choice(["byte", "word", "cut", "copy", "zeros", "end"]):
            case "byte":
                changed[at : at + 1] = bytes([draw.randrange(256)])
            case "word":
                word = draw.choice(WORDS)
                changed[at : at + len(word)] = word
            case "cut":
                del changed[at : at + length]
            case "copy":
                changed[at:at] = changed[at : at + length]
            case "zeros":
                changed[at:at] = bytes(length)
            case "end":
                del changed[at:]
    return bytes(changed)


@pytest.mark.filterwarnings("ignore")
def test_images(figure: Callable[[str], None]) -> None:
    draw, images, outcomes = random.Random(0), sound(), Counter[str]()
    for name, data in images.items():
        if name != "tiles":
            decode_image(data, max_pixels=MAX_PIXELS, where=name)
    before, slowest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0.0
    for number in range(NUM_MUTATIONS):
        name = draw.choice(sorted(images))
        data, start = mutated(images[name], draw), time.process_time()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                pixels = decode_image(data, max_pixels=MAX_PIXELS, where=name)
                assert pixels.ndim == 3
                assert pixels.shape[0] * pixels.shape[1] <= MAX_PIXELS
                outcomes["taken"] += 1
            except SampleError:
                outcomes["refused"] += 1
        taken = time.process_time() - start
        assert taken < CPU_SECONDS, f"mutation {number}, {name}: {taken:.1f} s"
        slowest = max(slowest, taken)
    growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert growth < GROWTH
    assert min(outcomes["taken"], outcomes["refused"]) > NUM_MUTATIONS // 20
    refused, mib = outcomes["refused"], growth / 2**20
    figure(f"{refused:,} of {NUM_MUTATIONS:,} refused; at most {slowest:.2f} s, {mib:.0f} MiB more")
