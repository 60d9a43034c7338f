"""Ten thousand damaged tars, zips and tables each: only our errors come out, in bounded memory and time.

The examples are the same in every run. Each is a sound file with parts cut, repeated, overwritten or exchanged for what
parsers stumble over; in half of the tars a header says something else with a checksum that agrees.
"""

from __future__ import annotations

import gzip
import io
import random
import resource
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from data_pipeline.datasets.folders import open_source
from data_pipeline.errors import PretrainError
from data_pipeline.ingest.image_normalizer import ImageNormalizer
from data_pipeline.ingest.tables import Columns, open_table
from data_pipeline.shards.scan import scan_shard
from tests.data_pipeline.archives import as_folder, as_tar, as_tar_gz, jpeg
from tests.drills.test_fuzz import HEADER_FIELDS, STUMBLING, TYPES

NUM_EXAMPLES = 10_000
ROOM = 2 * 2**30  # of address space beside what the process has
SECONDS = 30  # of this process's time for one example; a sound one takes a thousandth of one
WORDS = [
    *STUMBLING, b"14 size=-1536\n", b"13 mtime=inf\n", b"24 GNU.sparse.map=a,b,c\n", b"PK\x03\x04", b"PK\x01\x02",
    b"PK\x05\x06", b"\xff\xff\xff\xff", b'"', b"\n" * 40, b"a" * 5000, b"\x0c\x00", b"\x0e\x00", b"\x63\x00",
    b"\0" * 512,
]  # fmt: skip


@pytest.fixture(autouse=True)
def bounded_memory() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def damaged(rng: random.Random, content: bytes) -> bytes:
    """`content` after one to three changes."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        start, length = rng.randrange(len(data) + 1), rng.choice([0, 1, 2, 4, 8, 12, 100, 512])
        change = rng.choice(["cut", "bytes", "bit", "word", "copy", "end"])
        if change == "cut":
            del data[start : start + length]
        elif change == "bytes":
            data[start : start + length] = rng.randbytes(length)
        elif change == "bit" and start < len(data):
            data[start] ^= 1 << rng.randrange(8)
        elif change == "word":
            word = rng.choice(WORDS)
            data[start : start + len(word)] = word
        elif change == "copy":
            other = rng.randrange(len(data) + 1)
            data[start:start] = data[other : other + 512]
        elif change == "end" and rng.random() < 0.2:
            del data[start:]
    return bytes(data)


def other_header(rng: random.Random, content: bytes) -> bytes:
    """A tar in which one header says something else, with a checksum that agrees."""
    data = bytearray(content)
    at = 512 * rng.randrange(len(data) // 512)
    for _ in range(rng.randint(1, 3)):
        start, length = rng.choice(HEADER_FIELDS)
        value = rng.choice([rng.choice(WORDS), rng.choice(TYPES), rng.randbytes(length), b"\xff" * 12])
        data[at + start : at + start + length] = value[:length].ljust(length, b"\0")
    data[at + 148 : at + 156] = b" " * 8
    data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
    return bytes(data)


def fuzz(
    path: Path, examples: Callable[[random.Random], bytes], read: Callable[[Path], None], num_examples: int
) -> tuple[int, int]:
    """(how many were read, how many refused): all that may come of one."""
    rng, outcomes = random.Random(0), [0, 0]
    for number in range(num_examples):
        path.write_bytes(examples(rng))
        start = time.process_time()
        try:
            read(path)
            outcomes[0] += 1
        except PretrainError:
            outcomes[1] += 1
        except Exception as error:
            raise AssertionError(f"example {number} of {path.name}") from error
        assert time.process_time() - start < SECONDS, f"example {number} of {path.name}"
    return outcomes[0], outcomes[1]


def read_images(path: Path) -> None:
    """Every image of an archive; some may be bad, each by itself."""
    source = open_source(path, path.parent)
    for entry in source.images:
        try:
            source.reader.read(entry)
        except PretrainError:
            continue


def read_rows(path: Path) -> None:
    rows = open_table(path, Columns(), ImageNormalizer(None, 10**6), path.parent)
    list(rows.producer.produce(list(rows.store.offsets)))


def test_tars(tmp_path: Path, figure: Callable[[str], None]) -> None:
    long = "x" * 150  # which takes an extended header
    sound = as_tar(tmp_path / "sound", {"a/0.jpg": jpeg(0), "a/0.cls": b"1", f"a/{long}.jpg": jpeg(1)}).read_bytes()

    def examples(rng: random.Random) -> bytes:
        return damaged(rng, sound) if rng.random() < 0.5 else other_header(rng, sound[:-8192])

    read, refused = fuzz(tmp_path / "a.tar", examples, lambda path: scan_shard(path) and None, NUM_EXAMPLES // 2)
    assert min(read, refused) > 250
    read_too, refused_too = fuzz(tmp_path / "b.tar", examples, read_images, NUM_EXAMPLES // 4)
    assert min(read_too, refused_too) > 100
    packed = gzip.decompress(as_tar_gz(tmp_path / "c.tar.gz", {"a/0.jpg": jpeg(0)}).read_bytes())
    fuzz(tmp_path / "d.tar.gz", lambda rng: gzip.compress(damaged(rng, packed), 1), read_images, NUM_EXAMPLES // 4)
    figure(f"{read + read_too:,} of 7,500 read, the others refused")


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_zips(tmp_path: Path, method: int, figure: Callable[[str], None]) -> None:
    with zipfile.ZipFile(tmp_path / "sound", "w", method) as archive:
        for i in range(3):
            archive.writestr(f"a/{i}.jpg", jpeg(i))
    sound = (tmp_path / "sound").read_bytes()
    read, refused = fuzz(tmp_path / "a.zip", lambda rng: damaged(rng, sound), read_images, NUM_EXAMPLES // 4)
    assert min(read, refused) > 100
    figure(f"{read:,} of {read + refused:,} read, the others refused")


@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz", "t.tsv", "t.parquet"])
def test_tables(tmp_path: Path, name: str, figure: Callable[[str], None]) -> None:
    as_folder(tmp_path, {"a.jpg": jpeg(0)})
    rows = [{"image": "a.jpg", "caption": f'words, "{i}"\n; words', "label": i} for i in range(12)]
    if name.endswith("parquet"):
        packed = io.BytesIO()
        parquet.write_table(pa.Table.from_pylist(rows), packed, row_group_size=5)
        sound = packed.getvalue()
    else:
        comma = "\t" if ".tsv" in name else ","
        quoted = [[str(value).replace('"', '""') for value in row.values()] for row in rows]
        lines = [comma.join(f'"{value}"' for value in row) for row in quoted]
        sound = "\n".join([comma.join(rows[0]), *lines, ""]).encode()

    def examples(rng: random.Random) -> bytes:
        return gzip.compress(damaged(rng, sound), 1) if name.endswith("gz") else damaged(rng, sound)

    read, refused = fuzz(tmp_path / name, examples, read_rows, NUM_EXAMPLES // 4)
    assert min(read, refused) > 100
    figure(f"{read:,} of {read + refused:,} read, the others refused")
