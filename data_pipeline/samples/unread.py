"""Picture formats that are known and not read here: by the file's name, by its first bytes, and what to do with one."""

from __future__ import annotations

from pathlib import PurePosixPath

from data_pipeline.errors import SampleError

HEIC, JPEG_XL, JPEG_2000, JPEG_XR = "HEIC", "JPEG XL", "JPEG 2000", "JPEG XR"
BY_SUFFIX = {
    ".heic": HEIC,
    ".heif": HEIC,
    ".hif": HEIC,
    ".jxl": JPEG_XL,
    ".jp2": JPEG_2000,
    ".j2k": JPEG_2000,
    ".jpf": JPEG_2000,
    ".jpx": JPEG_2000,
    ".jxr": JPEG_XR,
}
_HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"}
_BEGINNINGS = {
    b"\x00\x00\x00\x0cJXL \r\n\x87\n": JPEG_XL,
    b"\xff\x0a": JPEG_XL,
    b"\x00\x00\x00\x0cjP  \r\n\x87\n": JPEG_2000,
    b"\xff\x4f\xff\x51": JPEG_2000,
    b"II\xbc": JPEG_XR,
}
_TOOLS = {
    HEIC: "heif-convert or ImageMagick",
    JPEG_XL: "djxl or ImageMagick",
    JPEG_2000: "ImageMagick",
    JPEG_XR: "ImageMagick",
}


def unread_suffix(name: str) -> bool:
    """Whether a file is a picture that is not read here, by its name."""
    return PurePosixPath(name).suffix.lower() in BY_SUFFIX


def unread_format(data: bytes) -> str | None:
    """The format of a picture that is not read here, by its first bytes whatever its name; None: no such one."""
    if data[4:8] == b"ftyp":
        length = min(int.from_bytes(data[:4], "big"), 256)
        brands = {data[8:12], *(data[i : i + 4] for i in range(16, length, 4))}  # the major one, and those it fits
        return HEIC if brands & _HEIC_BRANDS and not brands & {b"avif", b"avis"} else None
    return next((kind for beginning, kind in _BEGINNINGS.items() if data.startswith(beginning)), None)


def unread(data: bytes, where: str) -> SampleError | None:
    """The error that a picture's format is not read here, about `where`; None: it is not known to be such a one."""
    kind = unread_format(data)
    if kind is None:
        return None
    fix = f"Convert it to JPEG, PNG, WebP or AVIF first, with {_TOOLS[kind]}."
    return SampleError(where=where, expected="a picture in a format that is read here", found=kind, fix=fix)
