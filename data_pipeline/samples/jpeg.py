"""A JPEG's bytes -> its pixels, all of them: what libjpeg-turbo doubts is taken only where nothing is lost.

libjpeg paints gray, or what it made of the wrong bits, where scan data is missing, and warns; of several warnings only
the first has words. A warning of bytes that cost no picture (a few stray ones before a marker) is therefore taken away
with its cause, and the rest has to decode without any. Of what libjpeg never warns of, three things are read from the
markers: the number of scans, which each cost a pass over all blocks; scans that are not there; and zeros that stand in
the place of lost data.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from itertools import chain, islice, pairwise
from typing import NamedTuple

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

MAX_SCANS = 64  # encoders write about ten, and every one is a pass over the whole picture
MAX_STRAY_BYTES = 16  # before a marker; more are the rest of a scan that lost its way
_MAX_ATTEMPTS = 12  # to decode without a cause of doubt
_MAX_MARKERS = 4096  # among which a cause is looked for; profiles and scans take hundreds
_ZEROS = bytes(64)  # longer than any run in a scan whose shortest codes do not mean "nothing here"

_SOF, _DHT, _EOI, _SOS, _APP0, _APP14 = {0xC0, 0xC1, 0xC2, 0xC9, 0xCA}, 0xC4, 0xD9, 0xDA, 0xE0, 0xEE
_PROGRESSIVE, _HUFFMAN_SEQUENTIAL = {0xC2, 0xCA}, {0xC0, 0xC1}
_OTHER_SOF = {0xC3, 0xC5, 0xC6, 0xC7, 0xCB, 0xCD, 0xCE, 0xCF}
_UNUSUAL = {*range(0xC0), *_SOF, *_OTHER_SOF, *range(0xD0, 0xDA), 0xFF}  # before the first scan
_MARKER = re.compile(rb"\xff([\x01-\xcf\xd8-\xfe])")  # neither a byte 0xff of a scan, nor a restart
_STRAY = re.compile(r"(\d+) extraneous bytes before marker 0x([0-9a-f]{2})")


class BrokenJpegError(ValueError):
    """The bytes are no whole JPEG, or one that is not decoded; the message says why."""


class Frame(NamedTuple):
    """What the frame header says, and where the first scan's data begins.

    Attributes:
        kind: code of its marker: 0xC0 is baseline, 0xC2 progressive.
        components: their identifiers: one of gray, three of color, four of inks.
    """

    kind: int
    height: int
    width: int
    components: bytes
    scan: int = 0


class _Segment(NamedTuple):
    """A marker at `at`, and where its content starts and ends."""

    code: int
    at: int
    start: int
    end: int


def read_frame(data: bytes) -> Frame:
    """The frame of a JPEG of which every scan is there.

    Raises:
        BrokenJpegError: the markers are damaged, scans are missing, or there are more than `MAX_SCANS`.
    """
    if (plain := _plain_frame(data)) is not None:
        return plain
    frame: Frame | None = None
    for segment in _segments(data):
        if segment.code in _SOF:
            frame = _frame(data, segment)
        elif segment.code in _OTHER_SOF:
            raise BrokenJpegError(f"its kind of JPEG (frame 0x{segment.code:02x}) is not decoded")
        elif segment.code == _SOS:
            if frame is None:
                break
            num = data[segment.start]
            if frame.kind in _PROGRESSIVE or num < len(frame.components):
                _check_scans(data, frame)
            return Frame(frame.kind, frame.height, frame.width, frame.components, segment.end)
    raise BrokenJpegError("it ends before its first scan")


def _plain_frame(data: bytes) -> Frame | None:
    """The frame of a sequential JPEG whose one scan has all components, markers side by side; None: any other.

    Most are such, and of a small picture the walk over all markers would take longer than its decoding.
    """
    at, sof, code = 2, 0, 0
    try:
        while data[at] == 0xFF:
            code = data[at + 1]
            if code in _HUFFMAN_SEQUENTIAL and not sof:
                sof = at
            elif code == _SOS or code in _UNUSUAL:
                break
            at += 2 + (data[at + 2] << 8 | data[at + 3])
        if not sof or code != _SOS or data[at + 4] != data[sof + 9]:
            return None
    except IndexError:
        return None
    height, width = data[sof + 5] << 8 | data[sof + 6], data[sof + 7] << 8 | data[sof + 8]
    return Frame(data[sof + 1], height, width, data[sof + 10 : sof + 10 + 3 * data[sof + 9] : 3], at)


def decode(data: bytes, frame: Frame) -> NDArray[np.uint8]:
    """Pixels [H, W, 3], RGB; of four components [H, W, 4], as stored.

    Raises:
        BrokenJpegError: scan data is missing, or is not as it was written.
    """
    colorspace = "CMYK" if len(frame.components) == 4 else "RGB"
    waiting: Iterator[bytes] = iter([data])  # lazily, as each is a copy
    words = ""
    for _ in range(_MAX_ATTEMPTS):
        if (given := next(waiting, None)) is None:
            break
        try:
            pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(given, colorspace=colorspace)
        except ValueError as error:
            words = words or str(error)
            if "subsampling" in words:
                return _decode_rare_sampling(given, frame)
            waiting = chain(_without_cause(given, str(error)), waiting)
            continue
        if pixels.shape[:2] != (frame.height, frame.width):
            raise BrokenJpegError("it has two sizes")
        _check_zeros(given, frame)
        return pixels
    raise BrokenJpegError(words)


def _decode_rare_sampling(data: bytes, frame: Frame) -> NDArray[np.uint8]:
    """As `decode`, by Pillow, for what TurboJPEG has no name for, such as inks of which one is sampled twice as finely.

    Pillow passes no warning on. So each scan is followed by bytes that no whole scan reads: where two kinds of them
    make two pictures, they were taken for scan data that is missing.
    """
    pictures = []
    for filler in (bytes(4096), b"\x5a" * 4096):
        parts, at = [], 0
        for before, segment in pairwise(_segments(data)):
            if before.code == _SOS:
                parts += [data[at : segment.at], filler]
                at = segment.at
        with Image.open(io.BytesIO(b"".join([*parts, data[at:]])), formats=("JPEG",)) as image:
            pictures.append(np.array(image if len(frame.components) == 4 else image.convert("RGB")))
    if not parts or not np.array_equal(pictures[0], pictures[1]):
        raise BrokenJpegError("scan data is missing")
    _check_zeros(data, frame)
    return 255 - pictures[0] if len(frame.components) == 4 else pictures[0]


def _segments(data: bytes) -> Iterator[_Segment]:
    """Every marker up to the end of the image; scan data is passed over, as are stray bytes."""
    at = 2
    while (found := _MARKER.search(data, at)) is not None:
        at, code = found.start(), data[found.start() + 1]
        if code in (_EOI, 0x01, 0xD8):  # which have no content
            yield _Segment(code, at, at + 2, at + 2)
            if code == _EOI:
                return
            at += 2
            continue
        length = data[at + 2] << 8 | data[at + 3] if at + 4 <= len(data) else 0
        end = at + 2 + length
        if length < 2 or end > len(data):
            raise BrokenJpegError(f"its marker 0x{code:02x} is cut short")
        yield _Segment(code, at, at + 4, end)
        at = end


def _frame(data: bytes, segment: _Segment) -> Frame:
    content = data[segment.start : segment.end]
    if len(content) < 6 or len(content) < 6 + 3 * content[5]:
        raise BrokenJpegError("its frame header is cut short")
    height, width = int.from_bytes(content[1:3], "big"), int.from_bytes(content[3:5], "big")
    return Frame(segment.code, height, width, content[6 : 6 + 3 * content[5] : 3])


def _check_scans(data: bytes, frame: Frame) -> None:
    """Raises BrokenJpegError unless the scans send every component; of a progressive one, every bit of it."""
    num_scans = 0
    missing = {component: [True] * 64 for component in frame.components}  # by coefficient
    for segment in _segments(data):
        if segment.code != _SOS:
            continue
        num_scans += 1
        if num_scans > MAX_SCANS:
            raise BrokenJpegError(f"it has more than {MAX_SCANS} scans")
        content = data[segment.start : segment.end]
        num = content[0] if content else 0
        if not num or len(content) < 4 + 2 * num:
            raise BrokenJpegError("the header of a scan is cut short")
        first, last, low_bit = content[2 * num + 1], content[2 * num + 2], content[2 * num + 3] & 15
        if frame.kind not in _PROGRESSIVE:
            first, last, low_bit = 0, 63, 0
        for component in content[1 : 1 + 2 * num : 2]:
            for i in range(first, min(last, 63) + 1) if component in missing else ():
                missing[component][i] = low_bit > 0
    if any(any(coefficients) for coefficients in missing.values()):
        raise BrokenJpegError("it ends before its last scan")


def _without_cause(data: bytes, words: str) -> Iterator[bytes]:
    """The same picture without what `words`, a warning of libjpeg's, is of; nothing where data may be missing.

    Stray bytes may lie before each marker of that code which has as many bytes before it; most have none.
    """
    try:
        segments = list(islice(_segments(data), _MAX_MARKERS))
    except BrokenJpegError:  # of another attempt, perhaps, which took away what belongs there
        return
    if (stray := _STRAY.search(words)) is not None:
        size, code = int(stray[1]), int(stray[2], 16)
        ends = [2, *(segment.end for segment in segments)]
        for end, segment in zip(ends, segments, strict=False) if size <= MAX_STRAY_BYTES else ():
            if segment.code == code and segment.at - size >= end:
                yield data[: segment.at - size] + data[segment.at :]
        return
    for segment in segments:
        content = data[segment.start : segment.end]
        if "JFIF revision" in words and segment.code == _APP0 and content[:5] == b"JFIF\0":
            yield data[: segment.start + 5] + b"\1" + data[segment.start + 6 :]
        elif "Adobe color transform" in words and segment.code == _APP14 and len(content) >= 12:
            known = b"\1" if _num_components(data, segments) == 3 else b"\2"  # which libjpeg takes an unknown one for
            yield data[: segment.start + 11] + known + data[segment.start + 12 :]
        elif "SOS parameters for sequential" in words and segment.code == _SOS:
            yield data[: segment.end - 3] + b"\0\x3f\0" + data[segment.end :]


def _num_components(data: bytes, segments: list[_Segment]) -> int:
    return next((len(_frame(data, segment).components) for segment in segments if segment.code in _SOF), 0)


def _check_zeros(data: bytes, frame: Frame) -> None:
    """Raises BrokenJpegError where a scan has a long run of zeros that its codes do not write for a plain surface.

    A run of zero bits is the first code of a table again and again. Where that is neither "no difference" nor "end of
    block", no encoder writes 512 of them in a row.
    """
    if frame.kind not in _HUFFMAN_SEQUENTIAL or (zeros := data.find(_ZEROS, frame.scan)) < 0:
        return
    plain = {0: False, 1: False}  # by the class of the table: of differences, of coefficients
    for segment in _segments(data):
        if segment.code == _DHT:
            at = segment.start
            while at + 17 < segment.end:
                plain[data[at] >> 4 & 1] |= data[at + 17] == 0
                at += 17 + sum(data[at + 1 : at + 17])
        if segment.code == _EOI and segment.at < zeros:
            return
    if not all(plain.values()):
        raise BrokenJpegError("scan data was overwritten with zeros")
