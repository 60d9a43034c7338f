"""A JPEG is taken whole or not at all: what libjpeg fills with gray, or reads out of step, is no picture."""

from __future__ import annotations

import io
import tarfile
import tracemalloc
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipeline.errors import SampleError
from data_pipeline.ingest.convert import ConvertOptions, convert
from data_pipeline.samples import jpeg
from tests.data_pipeline.test_decode import decode

PHOTO = Image.fromarray(np.random.default_rng(1).integers(0, 256, (6, 6, 3), np.uint8)).resize((256, 256), 3)
KINDS: dict[str, dict[str, Any]] = {
    "baseline": {},
    "optimized": {"optimize": True},
    "progressive": {"progressive": True},
    "restarts": {"restart_marker_blocks": 16},
    "inks": {"mode": "CMYK"},
    "inks, one of them finer": {"mode": "CMYK", "subsampling": 2},
    "inks, finer, progressive": {"mode": "CMYK", "subsampling": 1, "progressive": True},
    "gray": {"mode": "L"},
}


def whole(kind: str, size: tuple[int, int] = (256, 256)) -> bytes:
    options = dict(KINDS[kind])
    file = io.BytesIO()
    PHOTO.resize(size).convert(options.pop("mode", "RGB")).save(file, "JPEG", quality=90, **options)
    return file.getvalue()


def middle(data: bytes) -> int:
    return len(data) // 2


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda d: d[: middle(d)],
    "cut and closed": lambda d: d[: middle(d)] + b"\xff\xd9",
    "a tail of zeros": lambda d: d[: middle(d)] + bytes(middle(d)),
    "a tail of zeros, closed": lambda d: d[: middle(d)] + bytes(middle(d)) + b"\xff\xd9",
    "a gap": lambda d: d[: middle(d)] + d[middle(d) + len(d) // 8 :],
    "a hole of zeros": lambda d: d[: middle(d)] + bytes(len(d) // 8) + d[middle(d) + len(d) // 8 :],
    "no end": lambda d: d[:-2],
}


UNSEEN = ("inks, finer, progressive", "a hole of zeros")  # of what TurboJPEG does not decode, bytes too many go unseen


@pytest.mark.parametrize(("kind", "damage"), [case for case in product(KINDS, DAMAGE) if case != UNSEEN])
def test_half_a_picture_is_refused(kind: str, damage: str) -> None:
    with pytest.raises(SampleError, match="sample: expected a whole image"):
        decode(DAMAGE[damage](whole(kind)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("further", ["after its end", "before its end", "before a table"])
def test_what_costs_no_picture_is_taken(kind: str, further: str) -> None:
    data = whole(kind)
    table = data.rindex(b"\xff\xc4" if "progressive" not in kind else b"\xff\xdb")
    changed = {
        "after its end": data + b"\xff\xd9 anything" * 40,
        "before its end": data[:-2] + b"\1\2\3" + data[-2:],
        "before a table": data[:table] + b"\0\0\0" + data[table:],
    }[further]
    assert np.array_equal(decode(changed), decode(data))


def test_stray_bytes_between_the_scans_of_a_progressive_one_are_taken() -> None:
    data = whole("progressive")
    scan = [segment.at for segment in jpeg._segments(data) if segment.code == 0xDA][4]
    assert np.array_equal(decode(data[:scan] + b"\0\0" + data[scan:]), decode(data))


def test_many_stray_bytes_are_a_scan_that_lost_its_way() -> None:
    data = whole("baseline")
    with pytest.raises(SampleError, match="extraneous bytes before marker 0xd9"):
        decode(data[:-2] + b"\1" * (jpeg.MAX_STRAY_BYTES + 9) + data[-2:])


def test_stray_bytes_are_taken_from_where_they_lie() -> None:
    """The file is copied for each attempt, not for each of the many markers that they might lie before."""
    data = whole("baseline")
    comments = b"\xff\xfe\0\2" * 1000
    assert np.array_equal(decode(data[:2] + comments + b"\1\2" + comments + data[2:]), decode(data))
    many = data[:2] + b"\0\xff\xfe\0\2" * 2000 + data[2:]
    tracemalloc.start()
    try:
        with pytest.raises(SampleError, match="extraneous bytes before marker 0xfe"):
            decode(many)
        assert tracemalloc.get_traced_memory()[1] < 15_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("scans", [1, 4, 9])
def test_a_progressive_one_that_ends_between_two_scans_is_refused(scans: int) -> None:
    """Nothing in libjpeg says so: the picture is whole, and blurred."""
    data = whole("progressive")
    ends = [segment.at for segment in jpeg._segments(data) if segment.code in (0xDA, 0xD9)]
    with pytest.raises(SampleError, match="before its last scan"):
        decode(data[: ends[scans]] + b"\xff\xd9")


def test_a_warning_about_a_version_hides_no_missing_data() -> None:
    data = whole("baseline")
    at = data.index(b"JFIF\0") + 5
    other = data[:at] + b"\x07" + data[at + 1 :]
    assert np.array_equal(decode(other), decode(data))
    with pytest.raises(SampleError):
        decode(DAMAGE["cut and closed"](other))


def test_a_plain_surface_of_zero_bits_is_a_picture() -> None:
    file = io.BytesIO()
    Image.new("RGB", (512, 512), (128, 128, 128)).save(file, "JPEG", optimize=True)
    assert bytes(64) in file.getvalue()
    assert (decode(file.getvalue()) == 128).all()


def test_the_number_of_scans_is_bounded() -> None:
    data = whole("progressive", (64, 64))
    segments = list(jpeg._segments(data))
    last = max(i for i, segment in enumerate(segments) if segment.code == 0xDA)
    scan, end = segments[last].at, segments[last + 1].at
    with pytest.raises(SampleError, match=f"more than {jpeg.MAX_SCANS} scans"):
        decode(data[:end] + data[scan:end] * jpeg.MAX_SCANS + data[end:])


def test_every_photograph_is_taken(shared_data: Path) -> None:
    with tarfile.open(shared_data / "photos.tar") as tar:
        for member in (member for member in tar if member.isfile()):
            file = tar.extractfile(member)
            assert file is not None
            data = file.read()
            assert np.array_equal(decode(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))), member.name


def test_half_pictures_are_not_laundered_by_making_them_smaller(tmp_path: Path) -> None:
    folder = tmp_path / "pictures" / "class"
    folder.mkdir(parents=True)
    (folder / "whole.jpg").write_bytes(whole("baseline"))
    for i, damage in enumerate(DAMAGE.values()):
        (folder / f"half{i}.jpg").write_bytes(damage(whole("baseline")))
    done = convert(tmp_path / "pictures", tmp_path / "shards", ConvertOptions(short_side=32), skip_bad=True)
    assert sum(manifest.total for manifest in done.manifests.values()) == 1
    assert len(done.bad) == len(DAMAGE)
