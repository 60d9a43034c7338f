"""Archives that were made to do harm end in an error of ours, with the place, in bounded time and memory."""

from __future__ import annotations

import errno
import gzip
import io
import os
import struct
import tarfile
import tracemalloc
import zipfile
from pathlib import Path
from typing import BinaryIO, cast

import pytest

from data_pipeline.datasets.folders import open_source
from data_pipeline.errors import SampleError, ShardError, SourceError
from data_pipeline.shards import scan, strict_tar
from data_pipeline.shards.scan import scan_shard
from data_pipeline.shards.strict_tar import MAX_HEADER
from tests.data_pipeline.archives import as_folder, as_tar, jpeg


def header(name: str, size: int, kind: bytes = b"0") -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    return member.tobuf(format=tarfile.USTAR_FORMAT)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def negative(size: int, kind: bytes = b"0") -> bytes:
    """A header whose size is negative, in base 256."""
    block = bytearray(header("README", 0, kind))
    block[124:136] = (256**12 + size).to_bytes(12, "big")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def extended(*records: bytes, kind: bytes = b"x") -> bytes:
    data = b"".join(records)
    return header("pax", len(data), kind) + padded(data)


GOOD = header("a.jpg", 4) + padded(b"\xff\xd8\xff\xd9")
CHAIN = extended(b"14 path=a.jpg\n")
TARS = {
    "a negative size": negative(-512),
    "a small negative size": negative(-1),
    "a negative extended header": negative(-2048, b"x"),
    "a negative long name": negative(-2048, b"L"),
    "a negative size in an extended header": extended(b"14 size=-1536\n") + header("README", 0),
    "a chain of headers": CHAIN * 1000 + GOOD,
    "a chain of large headers": extended(b"1000000 comment=" + b"x" * 999_983 + b"\n") * 8 + GOOD,
    "a length of another record": extended(b"90 path=a.jpg\n") + GOOD,
    "no length": extended(b"path=a.jpg\n") + GOOD,
    "lengths within lengths": extended(b"2 " * 200_000 + b"=") + GOOD,
    "a number without end": extended(b"%d path=%s\n" % (300_012, b"1" * 300_000)) + GOOD,
    "a map that is none": extended(b"24 GNU.sparse.map=a,b,c\n") + GOOD,
}


@pytest.mark.parametrize("name", TARS)
def test_headers_that_do_harm_are_refused_with_their_place(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(GOOD + TARS[name] + bytes(1024))
    tracemalloc.start()
    try:
        with pytest.raises(ShardError, match=r"a\.tar, offset 1024.*: expected"):
            scan_shard(path)
        with pytest.raises(SourceError, match=r"a\.tar, offset 1024.*: expected"):
            open_source(path, tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 12 * MAX_HEADER
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("time", [b"13 mtime=inf\n", b"13 mtime=nan\n", b"15 mtime=-1e99\n"])
def test_a_time_without_end_is_read(tmp_path: Path, time: bytes) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(extended(time) + GOOD + bytes(1024))
    assert [entry.name for entry in open_source(path, tmp_path).images] == ["a.jpg"]
    assert len(scan_shard(path)) == 1


def test_a_member_too_large_for_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "MAX_MEMBER_BYTES", 1000)
    with pytest.raises(ShardError, match=r"member 'a\.bin': expected members of at most 1,000 bytes, found 1,001"):
        scan_shard(as_tar(tmp_path / "a.tar", {"a.bin": bytes(1001)}))


def zipped(path: Path, **changes: int) -> Path:
    """Two images; of the first one's entry in the directory, fields changed."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.jpg", bytes(50_000_000) if "bomb" in changes else jpeg(0))
        archive.writestr("b.jpg", jpeg(1))
    data = bytearray(path.read_bytes())
    at = data.index(b"PK\x01\x02")
    places = {
        "method": (10, "<H"),
        "version": (6, "<H"),
        "packed": (20, "<I"),
        "size": (24, "<I"),
        "offset": (42, "<I"),
    }
    for name, value in changes.items():
        if name in places:
            start, form = places[name]
            data[at + start : at + start + struct.calcsize(form)] = struct.pack(form, value)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    "changes",
    [
        {"method": 99},
        {"method": 12},  # bzip2
        {"method": 14},  # LZMA
        {"packed": 3},
        {"size": 10},
        {"size": 100_000},
        {"offset": 2**31},
        {"offset": 7},
        {"bomb": 1, "size": 10},
    ],
)
def test_a_damaged_member_of_a_zip_is_one_bad_image(tmp_path: Path, changes: dict[str, int]) -> None:
    source = open_source(zipped(tmp_path / "a.zip", **changes), tmp_path)
    tracemalloc.start()
    try:
        with pytest.raises(SampleError, match=r"a\.jpg: expected a readable file"):
            source.reader.read(source.images[0])
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()
    assert source.reader.read(source.images[1]) == jpeg(1)


def test_a_zip_of_a_version_to_come_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"a\.zip: expected a whole zip, found zip file version"):
        open_source(zipped(tmp_path / "a.zip", version=255), tmp_path)


def test_a_whole_zip_is_not_refused(tmp_path: Path) -> None:
    source = open_source(zipped(tmp_path / "a.zip"), tmp_path)
    assert [source.reader.read(entry) for entry in source.images] == [jpeg(0), jpeg(1)]
    as_folder(tmp_path / "f", {"a.jpg": jpeg(0)})
    assert open_source(tmp_path / "f", tmp_path).images[0].name == "a.jpg"


class Failing(io.BytesIO):
    """An archive on a disk that fails after its first member."""

    def read(self, size: int | None = -1) -> bytes:
        if self.tell() >= 1024:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return super().read(size)


def test_an_archive_that_storage_does_not_give_is_not_called_damaged(tmp_path: Path) -> None:
    content = as_tar(tmp_path / "a.tar", {f"{i}.jpg": b"0" for i in range(3)}).read_bytes()
    with pytest.raises(ShardError, match=r"Input/output error\. Look at the storage first") as error:
        list(strict_tar.members(Failing(content), "a.tar", error=ShardError))
    assert "damaged" not in str(error.value)
    with gzip.open(io.BytesIO(b"\x1f\x8b" + content)) as unpacked, pytest.raises(ShardError, match="copy or make it"):
        list(strict_tar.members(cast(BinaryIO, unpacked), "a.tar.gz", error=ShardError))
