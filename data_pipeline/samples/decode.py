"""Bytes of an image -> uint8 RGB, [H, W, 3]; JPEG by libjpeg-turbo, the rest by Pillow.

- The size is read from the header and held against the limit before a pixel is decoded.
- A damaged or truncated image is a SampleError, never half a picture. What libjpeg-turbo doubts (stray bytes
  before a marker, for one) is left to Pillow, which takes it where no data is missing.
- EXIF orientation is not applied: pixels as they are stored, as torchvision, timm and open_clip read them.
- Transparency is laid over white; 16-bit gray is scaled to 8 bits; palettes, gray and CMYK become RGB.
- Of an animation, the first frame.
"""

from __future__ import annotations

import io

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import AvifImagePlugin, Image, UnidentifiedImageError

from data_pipeline.errors import SampleError
from data_pipeline.samples.unread import unread

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
    if data[:2] == b"\xff\xd8":
        image = _decode_jpeg(data, max_pixels, where)
        if image is not None:
            return image
    return _decode_any(data, max_pixels, where)


def _decode_jpeg(data: bytes, max_pixels: int, where: str) -> NDArray[np.uint8] | None:
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        _check_size(width, height, max_pixels, where)
        if colorspace in ("CMYK", "YCCK"):  # inks, often inverted: Pillow knows Adobe's marker
            return None
        image: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, colorspace="RGB")
    except ValueError:
        return None
    return image


def _decode_any(data: bytes, max_pixels: int, where: str) -> NDArray[np.uint8]:
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_size(image.width, image.height, max_pixels, where)
            _check_range(image, where)
            return np.array(_to_rgb(image))  # a copy, so that it can be written to
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        unknown = isinstance(error, UnidentifiedImageError)  # its own words are an address in memory
        reason = "no known format" if unknown else str(error)
        raise unread(data, where) or SampleError(
            where=where, expected="a whole image", found=f"{len(data)} bytes that do not decode: {reason}"
        ) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):  # 16-bit gray, which Pillow would clip at 255
        gray = np.asarray(image).astype(np.int64).clip(0, 65535)
        image = Image.fromarray(((gray + 128) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


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
