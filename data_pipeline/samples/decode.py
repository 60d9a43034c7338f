"""Bytes of an image -> uint8 RGB, [H, W, 3]; JPEG by libjpeg-turbo, the rest by Pillow.

- The size is read from the header and held against the limit before a pixel is decoded, and so is what else a
  header may ask for (bounds.py).
- A damaged or truncated image is a SampleError, never half a picture (of JPEGs: jpeg.py).
- EXIF orientation is not applied: pixels as they are stored, as torchvision, timm and open_clip read them.
- Transparency is laid over white; 16-bit gray is scaled to 8 bits; palettes, gray and CMYK become RGB.
- Of an animation, the first frame.
"""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from numpy.typing import NDArray
from PIL import AvifImagePlugin, Image, UnidentifiedImageError

from data_pipeline.errors import SampleError
from data_pipeline.samples import jpeg
from data_pipeline.samples.bounds import check_bounds
from data_pipeline.samples.unread import unread

# What Pillow and libjpeg-turbo raise of bytes that are no image; of some damage also what a slip of their own raises.
UNDECODABLE = (
    OSError, ValueError, SyntaxError, TypeError, LookupError, ArithmeticError, EOFError, AttributeError,
    struct.error, zlib.error, MemoryError, RecursionError, RuntimeError, Image.DecompressionBombError,
)  # fmt: skip
AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # or each loader process would start one for every core
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "BMP", "GIF", "PPM", "TIFF")  # Pillow tries no others: some run programs


def decode_image(data: bytes, *, max_pixels: int, where: str) -> NDArray[np.uint8]:
    """Decode one image to RGB, [H, W, 3] uint8, C-contiguous.

    Args:
        data: the encoded file.
        max_pixels: greatest height * width that is decoded.
        where: name of the sample, for the error.

    Raises:
        SampleError: no image, damaged, truncated, of more than `max_pixels`, or of values without a known white.
    """
    try:
        if data[:2] == b"\xff\xd8":
            return _decode_jpeg(data, max_pixels, where)
        check_bounds(data)
        return _decode_any(data, max_pixels, where)
    except UNDECODABLE as error:
        unknown = isinstance(error, UnidentifiedImageError)  # its own words are an address in memory
        reason = "no known format" if unknown else str(error) or type(error).__name__
        raise unread(data, where) or SampleError(
            where=where, expected="a whole image", found=f"{len(data)} bytes that do not decode: {reason}"
        ) from error


def _decode_jpeg(data: bytes, max_pixels: int, where: str) -> NDArray[np.uint8]:
    frame = jpeg.read_frame(data)
    _check_size(frame.width, frame.height, max_pixels, where)
    pixels = jpeg.decode(data, frame)
    if len(frame.components) == 4:  # inks, inverted as Adobe writes them
        return np.array(Image.fromarray(255 - pixels, "CMYK").convert("RGB"))
    return pixels


def _decode_any(data: bytes, max_pixels: int, where: str) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        _check_size(image.width, image.height, max_pixels, where)
        _check_range(image, where)
        return np.array(_to_rgb(image, data))  # a copy, so that it can be written to


def _to_rgb(image: Image.Image, data: bytes) -> Image.Image:
    if image.format == "PNG" and "transparency" in image.info:
        return _over_white(image, depth=data[24])
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):  # 16-bit gray, which Pillow would clip at 255
        image = Image.fromarray(_eight_bits(np.asarray(image).astype(np.int64)))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _over_white(image: Image.Image, depth: int) -> Image.Image:
    """A PNG of which one value is transparent, or entries of its palette are.

    Pillow holds the value, which has the file's `depth` in bits, against pixels that it made 8 bits deep.
    """
    transparent = image.info["transparency"]
    if image.mode.startswith("I"):  # 16-bit gray
        gray = np.asarray(image).astype(np.int64)
        return Image.fromarray(_eight_bits(np.where(gray == transparent, 65535, gray))).convert("RGB")
    if image.mode == "L" and depth < 8:
        image.info["transparency"] = transparent * (255 // (2**depth - 1))
    if image.mode == "RGB" and depth == 16:
        image.info["transparency"] = tuple(value >> 8 for value in transparent)
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _eight_bits(gray: NDArray[np.int64]) -> NDArray[np.uint8]:
    return ((gray.clip(0, 65535) + 128) // 257).astype(np.uint8)


def _check_range(image: Image.Image, where: str) -> None:
    """What is white is known of unsigned integers of up to 16 bits alone; PGM's are scaled to 16 by Pillow."""
    if image.mode == "F" or (image.mode == "I" and image.format != "PPM"):
        raise SampleError(
            where=where,
            expected="pixels of 8 or 16 bits",
            found="floating point numbers" if image.mode == "F" else "signed or 32-bit integers",
            fix="Convert it to 8 or 16 bits, as only you know which value is white.",
        )


def _check_size(width: int, height: int, max_pixels: int, where: str) -> None:
    if width * height > max_pixels:
        raise SampleError(
            where=where,
            expected=f"an image of at most {max_pixels} pixels (data.max_pixels)",
            found=f"{width} x {height} = {width * height}",
        )
