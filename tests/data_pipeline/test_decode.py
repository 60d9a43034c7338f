"""Decoding: what Pillow sees, in RGB; never half a picture, never more pixels than allowed."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from data_pipeline.errors import SampleError
from data_pipeline.samples.decode import decode_image

GRADIENT = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
PHOTO = Image.fromarray(GRADIENT).resize((70, 50), Image.Resampling.BICUBIC)


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def decode(data: bytes, max_pixels: int = 1_000_000) -> NDArray[np.uint8]:
    return decode_image(data, max_pixels=max_pixels, where="sample")


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
def test_a_jpeg_is_decoded_as_pillow_decodes_it(mode: str, progressive: bool, subsampling: int) -> None:
    data = encode(PHOTO.convert(mode), "JPEG", progressive=progressive, subsampling=subsampling)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.array_equal(decode(data), expected)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "PPM", "TIFF"])
def test_a_lossless_file_gives_back_its_pixels(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    assert np.array_equal(decode(encode(PHOTO, kind, **options)), np.asarray(PHOTO))


@pytest.mark.parametrize("mode", ["L", "P", "1"])
def test_grey_and_palettes_become_rgb(mode: str) -> None:
    image = PHOTO.convert(mode)
    assert np.array_equal(decode(encode(image, "PNG")), np.asarray(image.convert("RGB")))


def test_transparency_is_laid_over_white() -> None:
    pixels = np.zeros((2, 2, 4), np.uint8)
    pixels[0, 0] = (10, 20, 30, 255)  # opaque
    pixels[0, 1] = (10, 20, 30, 0)  # not to be seen
    pixels[1, 0] = (0, 0, 0, 127)  # half
    decoded = decode(encode(Image.fromarray(pixels), "PNG"))
    assert decoded[0].tolist() == [[10, 20, 30], [255, 255, 255]]
    assert abs(int(decoded[1, 0, 0]) - 128) <= 1


def test_a_transparent_palette_colour_is_white() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([9, 9, 9, 50, 60, 70])
    image.putdata([0, 1])
    assert decode(encode(image, "PNG", transparency=0)).tolist() == [[[255, 255, 255], [50, 60, 70]]]


def test_16_bit_grey_is_scaled_and_not_clipped() -> None:
    grey = np.array([[0, 257, 32768, 65535]], np.uint16)
    assert decode(encode(Image.fromarray(grey), "PNG"))[0, :, 0].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize("kind", ["PPM", "TIFF"])
def test_so_it_is_in_other_formats(kind: str) -> None:
    grey = np.array([[0, 257, 32768, 65535]], np.uint16)
    assert decode(encode(Image.fromarray(grey), kind))[0, :, 0].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize(("kind", "number"), [(np.float32, "floating point"), (np.int32, "32-bit")])
def test_numbers_without_a_known_white_are_refused_and_not_black(kind: type, number: str) -> None:
    data = encode(Image.fromarray(np.array([[0, 0.5, 1, 200]]).astype(kind)), "TIFF")
    with pytest.raises(SampleError, match=rf"sample: expected pixels of 8 or 16 bits, found .*{number}.* Convert it"):
        decode(data)


def test_an_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode(data)[0, 0].tolist() == [255, 0, 0]


def test_exif_orientation_is_left_alone() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees
    assert np.array_equal(decode(encode(PHOTO, "JPEG", exif=exif)), decode(encode(PHOTO, "JPEG")))


def test_stray_bytes_that_cost_no_picture_are_accepted() -> None:
    data = encode(PHOTO, "JPEG")
    end = data.rindex(b"\xff\xd9")
    assert np.array_equal(decode(data[:end] + b"\0\0\0" + data[end:]), decode(data))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@settings(max_examples=40, deadline=None)
@given(share=st.floats(0, 0.99))
def test_a_truncated_image_is_refused(kind: str, share: float) -> None:
    data = encode(PHOTO, kind)
    with pytest.raises(SampleError, match="sample"):
        decode(data[: int(share * len(data))])


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"]),
    place=st.floats(0, 1, exclude_max=True),
    junk=st.binary(min_size=1, max_size=8),
)
def test_damage_gives_an_image_or_a_sample_error_and_nothing_else(kind: str, place: float, junk: bytes) -> None:
    data = bytearray(encode(PHOTO, kind))
    at = int(place * len(data))
    data[at : at + len(junk)] = junk
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of odd tags
        try:
            image = decode(bytes(data))
        except SampleError:
            return
    assert image.dtype == np.uint8
    assert image.shape[2] == 3
    assert image.flags.c_contiguous
    assert image.flags.writeable


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xd8",
        b"an image, honestly",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        b"\0" * 500,
    ],
)
def test_what_is_no_image_is_refused(data: bytes) -> None:
    with pytest.raises(SampleError, match="a whole image"):
        decode(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_an_image_over_the_limit_is_refused_and_one_at_it_is_not(kind: str) -> None:
    data = encode(PHOTO, kind)
    decode(data, max_pixels=50 * 70)
    with pytest.raises(SampleError, match=r"at most 3499 pixels.*70 x 50"):
        decode(data, max_pixels=50 * 70 - 1)


@pytest.mark.parametrize("side", [5_000, 60_000])
def test_a_bomb_is_refused_by_its_header(side: int) -> None:
    """The file has no pixels at all: an answer about its size shows that they were not asked for."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    bomb = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    with pytest.raises(SampleError, match=r"pixels"):
        decode(bomb)
