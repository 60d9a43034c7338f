"""Whatever bytes stand in a file that we read, only our own errors come out: mutated tars, indexes, manifests, recipes.

Each file is a sound one with parts cut, repeated, overwritten or exchanged for what parsers stumble over. The examples
are the same in every run. Memory is bounded for all of them, as sizes in headers are among what is mutated.
"""

from __future__ import annotations

import json
import resource
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipeline.datasets.read import ShardDataset
from data_pipeline.errors import PretrainError
from data_pipeline.inspect.verify import verify
from data_pipeline.shards.index import ShardIndex
from data_pipeline.shards.load_manifest import load_manifest
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.scan import index_shards, scan_shard
from pretrain.recipe.files import dump, load_recipe
from pretrain.recipe.strict_yaml import write_yaml
from tests.data_pipeline.tiny import write_shards
from tests.recipe.recipes import SMALL

FUZZ = settings(
    max_examples=500, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
ROOM = 6 * 2**30  # of address space, most of which libraries map without using it

STUMBLING = [
    b"", b"\x00", b"\xff" * 8, b"\x80abc", b"null", b"true", b"NaN", b"-Infinity", b"1e999", b"-1", b"0", b"9" * 400,
    b"9" * 5000, b'"\\ud800"', b"[" * 3000, b'{"a":' * 3000, b"{}", b"[]", b'""', b"1.5", b"18446744073709551616",
    b"9223372036854775807", b"../../x.tar", b"\xf0\x9f\x98", b"\r\n", b"!!python/object:x [x]", b"&a [*a]",
    b"<<: *a", b"? [a]: b", b"\xef\xbb\xbf", b"\xfe\xff", b"- - - - - - - - - - - - - - - - - - - - a", b"0x1F", b"1_0",
    b"7777777777\x00", b"\x80" + b"\x00" * 3 + b"\xff" * 8, b"20 path=../../x\n", b"30 GNU.sparse.size=99999999999\n",
]  # fmt: skip


@st.composite
def mutated(draw: st.DrawFn, content: bytes) -> bytes:
    """`content` after one to four changes."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        length = draw(st.sampled_from([0, 1, 2, 8, 12, 100, 512]))
        change = draw(st.sampled_from(["cut", "bytes", "word", "copy", "end"]))
        if change == "cut":
            del data[start : start + length]
        elif change == "bytes":
            data[start : start + length] = draw(st.binary(max_size=12))
        elif change == "word":
            data[start : start + length] = draw(st.sampled_from(STUMBLING))
        elif change == "copy":
            other = draw(st.integers(0, len(data)))
            data[start:start] = data[other : other + 512]
        else:
            del data[start:]
    return bytes(data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("sound")
    write_shards(place, [2, 1])
    return place


@pytest.fixture(autouse=True)
def bounded_memory() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@dataclass
class Tries:
    """What became of all that was tried."""

    refused: int = 0
    read: int = 0

    def __call__(self, read: Callable[[], object]) -> None:
        """MemoryError, RecursionError and whatever else a library raises fail the test."""
        try:
            read()
        except PretrainError:
            self.refused += 1
        else:
            self.read += 1

    @property
    def say_something(self) -> bool:
        """Some was refused and some was read; or what was tried is all noise, or not damaged at all."""
        return self.refused > 20 and self.read > 0


def test_tars(folder: Path, tmp_path: Path) -> None:
    sound = (folder / "part-000.tar").read_bytes()
    end = len(sound.rstrip(b"\0"))  # what follows is padding, in which nothing is to be found
    tries = Tries()

    @FUZZ
    @given(mutated(sound[:end]), st.booleans())
    def try_one(content: bytes, ended: bool) -> None:
        path = tmp_path / "a.tar"
        path.write_bytes(content + sound[end:] if ended else content)
        tries(lambda: scan_shard(path))
        for left in ("a.idx", "manifest.json"):
            (tmp_path / left).unlink(missing_ok=True)
        tries(lambda: index_shards(str(tmp_path)))

    try_one()
    assert tries.say_something, tries


# Name, mode, uid, size, mtime, type, link, magic, prefix: (offset, length).
HEADER_FIELDS = [(0, 100), (100, 8), (108, 8), (124, 12), (136, 12), (156, 1), (157, 100), (257, 8), (345, 155)]
TYPES = [b"L", b"K", b"x", b"g", b"S", b"1", b"2", b"5"]  # long names, extended headers, sparse files, links, folders


def test_tar_headers(folder: Path, tmp_path: Path) -> None:
    """As above, with a checksum that agrees, so that what the header says is believed."""
    sound = (folder / "part-000.tar").read_bytes()
    values = st.one_of(st.binary(max_size=12), st.sampled_from(STUMBLING), st.sampled_from(TYPES))
    tries = Tries()

    @FUZZ
    @given(
        st.lists(st.tuples(st.sampled_from(HEADER_FIELDS), values), min_size=1, max_size=3), st.sampled_from([0, 1024])
    )
    def try_one(changes: list[tuple[tuple[int, int], bytes]], at: int) -> None:
        header = bytearray(sound[at : at + 512])
        for (start, length), value in changes:
            header[start : start + length] = value[:length].ljust(length, b"\x00")
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\x00 " % sum(header)
        path = tmp_path / "a.tar"
        path.write_bytes(sound[:at] + header + sound[at + 512 :])
        tries(lambda: scan_shard(path))

    try_one()
    assert tries.say_something, tries


def test_indexes(folder: Path) -> None:
    path = folder / "part-000.idx"
    sound = path.read_bytes()
    length = struct.unpack("<Q", sound[:8])[0]
    tries = Tries()

    @FUZZ
    @given(mutated(sound), mutated(sound[8 : 8 + length]), st.booleans())
    def try_one(content: bytes, header: bytes, whole: bool) -> None:
        """All of it, or its header alone behind a length that agrees."""
        path.write_bytes(content if whole else struct.pack("<Q", len(header)) + header + sound[8 + length :])
        tries(lambda: ShardIndex.load(path).keys[:])
        tries(lambda: [ShardDataset(load_manifest(str(folder))).read(i) for i in range(3)])
        tries(lambda: verify(str(folder)))

    try:
        try_one()
    finally:
        path.write_bytes(sound)
    assert tries.say_something, tries


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.just(10**30) | st.just("a.tar"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def test_manifests(folder: Path) -> None:
    path = folder / "manifest.json"
    sound = path.read_bytes()
    tree = json.loads(sound)
    tries = Tries()

    @FUZZ
    @given(mutated(sound), st.dictionaries(st.sampled_from(sorted(tree)), JSON, max_size=2), st.booleans())
    def try_one(content: bytes, changes: dict[str, object], whole: bool) -> None:
        path.write_bytes(content if whole else json.dumps(tree | changes).encode())
        tries(lambda: Manifest.read(path).fingerprint)
        tries(lambda: [ShardDataset(load_manifest(str(folder))).read(i) for i in range(3)])
        tries(lambda: verify(str(folder)))

    try:
        try_one()
    finally:
        path.write_bytes(sound)
    assert tries.say_something, tries


def test_recipes(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(write_yaml(SMALL))
    sound = dump(load_recipe(path)).encode()
    tries = Tries()

    @FUZZ
    @given(mutated(sound), JSON, st.sampled_from(sorted(SMALL)), st.booleans())
    def try_one(content: bytes, value: object, group: str, whole: bool) -> None:
        path.write_bytes(content if whole else json.dumps(SMALL | {group: value}).encode())
        tries(lambda: dump(load_recipe(path)))

    try_one()
    assert tries.say_something, tries


def test_overrides(tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    path.write_text(write_yaml(SMALL))
    tries = Tries()

    @FUZZ
    @given(st.text(max_size=40) | st.sampled_from([word.decode("latin1") for word in STUMBLING]), st.booleans())
    def try_one(text: str, is_value: bool) -> None:
        tries(lambda: load_recipe(path, [f"optim.base_lr={text}" if is_value else text]))

    try_one()
    assert tries.say_something, tries
