"""AVIF is read, in one thread and never by half; pictures in formats that are not read say what to do with them."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import AvifImagePlugin, Image

from data_pipeline.errors import SampleError
from data_pipeline.samples.decode import decode_image
from data_pipeline.samples.unread import BY_SUFFIX, unread_format, unread_suffix

PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)).resize((70, 50))


def avif(image: Image.Image, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "AVIF", **options)
    return file.getvalue()


def test_an_avif_is_decoded_as_pillow_decodes_it() -> None:
    for mode in ("RGB", "L", "RGBA"):
        data = avif(PHOTO.convert(mode), quality=90)
        pixels = decode_image(data, max_pixels=10_000, where="sample")
        assert np.array_equal(pixels, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
        assert np.abs(pixels.astype(int) - np.asarray(PHOTO.convert(mode).convert("RGB"))).mean() < 6
    with pytest.raises(SampleError, match="at most 3000 pixels"):
        decode_image(data, max_pixels=3000, where="sample")
    assert AvifImagePlugin.DEFAULT_MAX_THREADS == 1


def test_an_avif_with_a_changed_byte_is_taken_or_refused() -> None:
    data, refused = avif(PHOTO, quality=90), 0
    for at in range(len(data)):
        try:
            decode_image(data[:at] + bytes([data[at] ^ 0x80]) + data[at + 1 :], max_pixels=10_000, where="sample")
        except SampleError:
            refused += 1
    assert 0 < refused < len(data)


def test_a_cut_avif_is_refused_at_every_length() -> None:
    data = avif(PHOTO, quality=90)
    for length in range(0, len(data), 17):
        with pytest.raises(SampleError):
            decode_image(data[:length], max_pixels=10_000, where="sample")


@pytest.mark.parametrize(
    ("beginning", "kind"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heix", "HEIC"),
        (b"\xff\x0a\x00", "JPEG XL"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
        (b"\xff\x4f\xff\x51\x00", "JPEG 2000"),
        (b"II\xbc\x01", "JPEG XR"),
    ],
)
def test_formats_that_are_not_read_are_told_by_their_content(beginning: bytes, kind: str) -> None:
    with pytest.raises(SampleError, match=rf"a\.jpg: expected a picture .* found {kind}\. Convert it to JPEG"):
        decode_image(beginning + bytes(40), max_pixels=100, where="a.jpg")
    assert kind in BY_SUFFIX.values()


def test_what_is_read_is_not_taken_for_one_of_them() -> None:
    assert unread_format(avif(PHOTO)) is None
    assert unread_format(b"\0\0\0\x1cftypmif1\0\0\0\0mif1heicavif") is None
    assert unread_format(b"\0\0\0\x18ftypisom\0\0\0\0mp42avc1") is None
    for kind in ("JPEG", "PNG", "WEBP", "TIFF"):
        file = io.BytesIO()
        PHOTO.save(file, kind)
        assert unread_format(file.getvalue()) is None
    assert [unread_suffix(name) for name in ("a/b.HEIC", "a.jp2", "a.avif", "heic")] == [True, True, False, False]
