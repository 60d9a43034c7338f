"""What is taken of an image into a shard: its bytes as they are, under the extension they deserve, or smaller."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from data_pipeline.errors import SampleError
from data_pipeline.messages import reason
from data_pipeline.samples.bounds import check_bounds
from data_pipeline.samples.decode import FORMATS, UNDECODABLE, decode_image
from data_pipeline.samples.unread import unread

EXTENSIONS = {
    "JPEG": "jpg",
    "MPO": "jpg",
    "PNG": "png",
    "WEBP": "webp",
    "AVIF": "avif",
    "BMP": "bmp",
    "GIF": "gif",
    "PPM": "ppm",
    "TIFF": "tiff",
}
JPEG_QUALITY = 95  # of what is made smaller; the loss is below what one more resize does


@dataclass(frozen=True)
class ImageNormalizer:
    """Looks at each image's header; makes larger ones smaller where that is asked for.

    Attributes:
        short_side: images whose shorter side is longer become this small, as JPEG; None: bytes are kept.
        max_pixels: an image of more counts as bad.
    """

    short_side: int | None
    max_pixels: int

    def member(self, data: bytes, where: str) -> tuple[str, bytes]:
        """(extension, bytes) of the image in a shard; raises SampleError, naming `where`."""
        extension, size = image_header(data, where)
        if size[0] * size[1] > self.max_pixels:
            raise SampleError(
                where=where,
                expected=f"at most {self.max_pixels:,} pixels",
                found=f"{size[0]} x {size[1]} pixels",
            )
        if self.short_side is None or min(size) <= self.short_side:
            return extension, data
        return "jpg", _smaller(data, self.short_side, self.max_pixels, where)


def image_header(data: bytes, where: str) -> tuple[str, tuple[int, int]]:
    """(extension of the format it is in, (width, height)) from the header alone; raises SampleError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            check_bounds(data)
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                return EXTENSIONS[image.format or ""], image.size
    except UNDECODABLE as error:
        why = "no known format" if isinstance(error, UnidentifiedImageError) else reason(error)
        raise unread(data, where) or SampleError(
            where=where, expected="an image", found=f"{len(data)} bytes that are none ({why})"
        ) from error


def _smaller(data: bytes, short_side: int, max_pixels: int, where: str) -> bytes:
    image = Image.fromarray(decode_image(data, max_pixels=max_pixels, where=where))
    scale = short_side / min(image.size)
    size = (max(short_side, round(image.width * scale)), max(short_side, round(image.height * scale)))
    pixels = np.asarray(image.resize(size, Image.Resampling.BICUBIC))
    encoded: bytes = simplejpeg.encode_jpeg(pixels, quality=JPEG_QUALITY, colorsubsampling="420")
    return encoded
