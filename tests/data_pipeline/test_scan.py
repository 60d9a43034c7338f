"""Indexing a tar: the samples webdataset reads, or an error where it would lose some without a word."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import ManifestError, ShardError
from data_pipeline.shards.index import MISSING
from data_pipeline.shards.scan import index_shards, scan_shard
from tests.data_pipeline.archives import as_tar, contents, jpeg

Samples = list[tuple[str, dict[str, bytes]]]
OWN_NAMES = ("__key__", "__url__", "__local_path__")  # which webdataset adds to a sample


def read_by_index(path: Path) -> Samples:
    index, content = scan_shard(path), path.read_bytes()
    samples = []
    for row, key in enumerate(index.keys):
        members = {}
        for column, field in enumerate(index.fields):
            start, size = int(index.offsets[row, column]), int(index.sizes[row, column])
            if start != MISSING:
                members[field] = content[start : start + size]
        samples.append((key, members))
    return samples


def read_by_webdataset(path: Path) -> Samples:
    pipeline = webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False)
    return [
        (sample["__key__"], {name: data for name, data in sample.items() if name not in OWN_NAMES})
        for sample in pipeline
    ]


def names() -> st.SearchStrategy[str]:
    """Names with the parts that decide about keys: dots, folders, underscores, capitals, other alphabets."""
    part = st.text(st.sampled_from("ab.A_é-"), min_size=1, max_size=5).filter(lambda p: p not in (".", ".."))
    return st.lists(part, min_size=1, max_size=3).map("/".join)


@settings(max_examples=150, deadline=None)
@given(files=st.dictionaries(names(), st.binary(max_size=600), max_size=8))
def test_index_finds_the_samples_that_webdataset_reads(
    tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes]
) -> None:
    path = as_tar(tmp_path_factory.mktemp("tar") / "shard.tar", files)
    error = ""
    try:
        found = read_by_index(path)
    except ShardError as raised:
        error = str(raised)
    if error:  # a key in two places, or two members of one name: webdataset splits the sample, or stops
        assert "a second" in error
    else:
        assert found == read_by_webdataset(path)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    files = {}
    for i in range(5):
        files[f"{i}.cls"] = str(i).encode()
        files[f"{i}.jpg"] = jpeg(i)
    files["4.txt"] = b""  # with nothing but zeros behind its header
    return as_tar(tmp_path_factory.mktemp("sound") / "shard.tar", files)


def test_no_truncation_goes_unseen(sound: Path, tmp_path: Path) -> None:
    content = sound.read_bytes()
    with tarfile.open(sound) as tar:
        end = max(member.offset_data + -(-member.size // 512) * 512 for member in tar)
    cut = tmp_path / "cut.tar"
    lost = 0
    for size in {*range(0, end + 512, 256), 1, end - 1, end + 511}:
        cut.write_bytes(content[:size])
        with pytest.raises(ShardError, match=r"cut\.tar"):
            scan_shard(cut)
        if 0 < size < end and size % 512 == 0:
            lost += len(read_by_webdataset_or_less(cut)) < 5
    assert lost  # webdataset's reader does lose samples here without an error, which is why this is tested
    cut.write_bytes(content[: end + 512])
    assert len(scan_shard(cut)) == 5


def read_by_webdataset_or_less(path: Path) -> Samples:
    try:
        return read_by_webdataset(path)
    except Exception:
        return [("", {})] * 5


def test_no_damaged_header_goes_unseen(sound: Path, tmp_path: Path) -> None:
    content = sound.read_bytes()
    with tarfile.open(sound) as tar:
        headers = [member.offset for member in tar]
    damaged = tmp_path / "damaged.tar"
    for offset in headers:
        for byte in (0, 100, 124, 148, 156, 257):  # name, mode, size, checksum, type, magic
            changed = bytearray(content)
            changed[offset + byte] ^= 0x15
            damaged.write_bytes(changed)
            with pytest.raises(ShardError, match=rf"damaged\.tar, offset {offset}.*(damaged|invalid|bad)"):
                scan_shard(damaged)


def test_data_behind_the_end_mark_is_told(sound: Path, tmp_path: Path) -> None:
    twice = tmp_path / "twice.tar"
    twice.write_bytes(sound.read_bytes() * 2)
    with pytest.raises(ShardError, match="the end mark, and data again"):
        scan_shard(twice)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_bytes_give_an_index_or_our_error(sound: Path, data: st.DataObject) -> None:
    content = bytearray(sound.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(content) - 1))
        patch = data.draw(st.binary(min_size=1, max_size=20))
        content[start : start + len(patch)] = patch
    path = sound.parent / "any.tar"
    path.write_bytes(content)
    try:
        index = scan_shard(path)
    except ShardError:
        return
    assert len(index.keys) == len(index.offsets) == len(index)
    there = index.offsets >= 0
    assert (index.sizes[there] >= 0).all(), "members have a size"
    assert (index.offsets + index.sizes <= len(content)).all(), "and lie in the file"


def member(name: str, **attributes: Any) -> tarfile.TarInfo:
    header = tarfile.TarInfo(name)
    for attribute, value in attributes.items():
        setattr(header, attribute, value)
    return header


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (member("a.jpg", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "a link"),
        (member("a.jpg", type=tarfile.LNKTYPE, linkname="0.jpg"), "a link"),
        (member("a.jpg", type=tarfile.CHRTYPE), "a link, device"),
        (member("a.jpg", type=tarfile.FIFOTYPE), "a link, device"),
        (member("../a.jpg"), "leaves"),
        (member("/a.jpg"), "leaves"),
        (member("b/../../a.jpg"), "leaves"),
        (member("a.pyd"), "pickle"),
        (member("a.seg.PKL"), "pickle"),
        (member("a.pickle"), "pickle"),
        (member("0.jpg"), "a second time"),
        (member("1.JPG"), "a second one"),
        (member("a.jpg", pax_headers={"comment": "x" * 2_000_000}), "a header of"),
    ],
)
def test_members_that_are_refused(tmp_path: Path, header: tarfile.TarInfo, reason: str) -> None:
    path = as_tar(tmp_path / "shard.tar", {"0.jpg": b"0", "1.jpg": b"1"})
    with tarfile.open(path, "a") as tar:
        tar.addfile(header, io.BytesIO(b""))
    with pytest.raises(ShardError, match=reason):
        scan_shard(path)


@pytest.mark.parametrize("text", [b"", b"cat", b"1.5", b"-1", b"10000000", b"1 2", b"9" * 40])
def test_label_that_is_none(tmp_path: Path, text: bytes) -> None:
    path = as_tar(tmp_path / "shard.tar", {"k/a.cls": text})
    with pytest.raises(ShardError, match=r"k/a\.cls.*digits of an integer"):
        scan_shard(path)


def test_indexing_is_the_same_with_two_processes(sound: Path, tmp_path: Path) -> None:
    folders = []
    for workers in (0, 2):
        folder = tmp_path / str(workers)
        folder.mkdir()
        for i in range(3):
            (folder / f"{i}.tar").write_bytes(sound.read_bytes())
        index_shards(str(folder / "{0..2}.tar"), workers=workers)
        folders.append(contents(folder))
    assert folders[0] == folders[1]


def test_index_leaves_a_manifest_and_an_unfinished_dataset_alone(sound: Path, tmp_path: Path) -> None:
    shard = tmp_path / "0.tar"
    shard.write_bytes(sound.read_bytes())
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(ManifestError, match="unfinished"):
        index_shards(str(tmp_path))
    (tmp_path / "plan.json").unlink()
    with pytest.raises(ManifestError, match="label 4"):
        index_shards(str(tmp_path), classes=["a", "b"])
    assert not (tmp_path / "manifest.json").exists()
    index_shards(str(tmp_path))
    before = contents(tmp_path)
    with pytest.raises(ManifestError, match="there already"):
        index_shards(str(tmp_path), classes=["a"])
    assert contents(tmp_path) == before


@pytest.mark.parametrize("content", [b"v1.2 3\njpg 0 512 a.jpg\n", b"", b"\xff" * 40])
def test_a_foreign_file_under_the_name_of_an_index_stays(sound: Path, tmp_path: Path, content: bytes) -> None:
    """DALI's wds2idx writes SHARD.idx too. Nothing is written, not even for the other shards."""
    for i in range(2):
        (tmp_path / f"{i}.tar").write_bytes(sound.read_bytes())
    (tmp_path / "1.idx").write_bytes(content)
    before = contents(tmp_path)
    with pytest.raises(ManifestError, match=r"1\.idx: expected no file of this name.*wds2idx.*links to the tars"):
        index_shards(str(tmp_path))
    assert contents(tmp_path) == before
    links = tmp_path / "links"
    links.mkdir()
    for i in range(2):
        (links / f"{i}.tar").symlink_to(tmp_path / f"{i}.tar")
    assert index_shards(str(links)).total == 2 * index_shards(str(tmp_path / "0.tar")).total
    (tmp_path / "manifest.json").unlink()
    index_shards(str(tmp_path / "0.tar"))  # over one of ours


def test_members_that_are_not_side_by_side_are_brought_together_by_name(tmp_path: Path) -> None:
    """Nobody is told to leave the label out; the command that is told mends the tar."""
    names = ["a.jpg", "b.jpg", "c.jpg", "a.cls", "b.cls", "c.cls"]
    with tarfile.open(tmp_path / "OLD.tar", "w") as tar:
        for name in names:
            header = member(name, size=1)
            tar.addfile(header, io.BytesIO(b"0"))
    with pytest.raises(ShardError, match=r"member 'a\.cls': expected the members of a sample side by side") as caught:
        scan_shard(tmp_path / "OLD.tar")
    command = caught.value.fix.partition("nothing: ")[2]
    subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    index = scan_shard(tmp_path / "NEW.tar")
    assert [key.removeprefix("./") for key in index.keys] == ["a", "b", "c"]
    assert index.fields == ("cls", "jpg")


def test_two_samples_of_one_key_are_told_apart_from_members_astray(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name in ("a.jpg", "b.jpg", "a.jpg"):
            tar.addfile(member(name, size=1), io.BytesIO(b"0"))
    with pytest.raises(ShardError, match=r"expected one sample of a key in a tar.*Give one of them another name"):
        scan_shard(tmp_path / "0.tar")


@pytest.mark.parametrize(("pack", "kind"), [(gzip.compress, "gzip"), (bz2.compress, "bzip2"), (lzma.compress, "xz")])
def test_a_compressed_tar_is_called_so(sound: Path, tmp_path: Path, pack: Callable[[bytes], bytes], kind: str) -> None:
    path = tmp_path / "0.tar"
    path.write_bytes(pack(sound.read_bytes()))
    with pytest.raises(ShardError, match=f"expected an uncompressed tar, .*found a {kind} file.*Unpack it: "):
        scan_shard(path)
