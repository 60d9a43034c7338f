"""Manifest and index: what is saved is loaded, what is not whole is refused, and by our own errors only."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.datasets.training import open_training
from data_pipeline.errors import DataError, ManifestError, ShardError
from data_pipeline.ingest.convert import ConvertOptions, convert
from data_pipeline.shards.index import MISSING, NO_LABEL, Keys, ShardIndex
from data_pipeline.shards.load_manifest import load_manifest
from data_pipeline.shards.manifest import Manifest, _as_json
from data_pipeline.shards.scan import index_shards
from data_pipeline.shards.specs import split_url
from tests.data_pipeline.archives import as_tar, contents, jpeg


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards of 4, 0 and 2 samples; labels 0, 1, 2 and, in the last shard, none."""
    root = tmp_path_factory.mktemp("dataset")
    for shard, count in enumerate((4, 0, 2)):
        files = {}
        for i in range(count):
            files[f"{shard}/{i}.jpg"] = jpeg(i)
            if shard == 0:
                files[f"{shard}/{i}.cls"] = str(i % 3).encode()
        as_tar(root / f"part-{shard}.tar", files)
    index_shards(str(root), classes=["ape", "bee", "cow"])
    return root


def copy(dataset: Path, to: Path) -> Path:
    to.mkdir()
    for name, data in contents(dataset).items():
        (to / name).write_bytes(data)
    return to


def test_manifest_tells_what_the_shards_hold(dataset: Path) -> None:
    manifest = load_manifest(str(dataset))
    assert manifest.names == ("part-0.tar", "part-1.tar", "part-2.tar")
    assert manifest.num_samples.tolist() == [4, 0, 2]
    assert manifest.total == 6
    assert manifest.fields == ("cls", "jpg")
    assert manifest.classes == ("ape", "bee", "cow")
    assert manifest.label_counts is not None
    assert manifest.label_counts.tolist() == [2, 1, 1]
    index = manifest.index(2)
    assert list(index.keys) == ["2/0", "2/1"]
    assert index.labels.tolist() == [NO_LABEL, NO_LABEL]
    assert index.fields == ("jpg",)


def test_saving_what_was_loaded_changes_nothing(dataset: Path, tmp_path: Path) -> None:
    root = copy(dataset, tmp_path / "copy")
    before = contents(root)
    manifest = load_manifest(str(root))
    manifest.save()
    for i in range(3):
        manifest.index(i).save(manifest.index_path(i))
    assert contents(root) == before


def test_fingerprint_is_of_the_data_and_not_of_the_place(dataset: Path, tmp_path: Path) -> None:
    manifest = load_manifest(str(dataset))
    assert load_manifest(str(copy(dataset, tmp_path / "copy"))).fingerprint == manifest.fingerprint
    other = replace(manifest, sha256=("0" * 64, *manifest.sha256[1:]))
    assert other.fingerprint != manifest.fingerprint


def test_pattern_selects_shards_with_their_own_histogram(dataset: Path) -> None:
    part = load_manifest(str(dataset / "part-{2,0}.tar"))
    assert part.names == ("part-0.tar", "part-2.tar")
    assert part.label_counts is not None
    assert part.label_counts.tolist() == [2, 1, 1]
    alone = load_manifest(str(dataset / "part-2.tar"))
    assert alone.total == 2
    assert alone.label_counts is None
    assert alone.fingerprint != part.fingerprint != load_manifest(str(dataset)).fingerprint
    assert load_manifest(str(dataset / "manifest.json")).total == 6


def test_missing_and_cut_shards_are_named(dataset: Path, tmp_path: Path) -> None:
    root = copy(dataset, tmp_path / "copy")
    shard = root / "part-2.tar"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ShardError, match=r"part-2\.tar.*bytes, as the manifest says"):
        load_manifest(str(root))
    shard.unlink()
    with pytest.raises(ShardError, match=r"part-2\.tar.*no such file"):
        load_manifest(str(root))
    with pytest.raises(ShardError, match="no file"):
        load_manifest(str(root / "part-{0..7}.tar"))
    copy(dataset, tmp_path / "other").joinpath("part-0.idx").unlink()
    with pytest.raises(ManifestError, match=r"part-0\.idx.*no such file"):
        load_manifest(str(tmp_path / "other"))


def test_index_of_another_tar_is_refused(dataset: Path, tmp_path: Path) -> None:
    root = copy(dataset, tmp_path / "copy")
    (root / "part-0.idx").write_bytes((root / "part-2.idx").read_bytes())
    with pytest.raises(ManifestError, match="that of 2 samples"):
        load_manifest(str(root)).index(0)


@pytest.mark.parametrize("url", ["pipe:cat x.tar", "ftp://host/x.tar", "gs://bucket/{0..9}.tar", "file:x"])
def test_urls_are_refused(url: str) -> None:
    with pytest.raises(DataError, match=r"expected a local folder.*URL"):
        load_manifest(url)


@pytest.mark.parametrize(
    "pattern",
    ["{a,b", "{/x,y}.tar", "{../x,y}.tar", "a{0..99999999999}.tar", "{a,{b,{c" * 300 + "}}}" * 300, "a.txt", ""],
)
def test_strange_patterns_are_our_errors(pattern: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("data_pipeline.shards.specs.MAX_NAMES", 1000)
    with pytest.raises(DataError):
        load_manifest(pattern)


def test_folder_without_manifest_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="pretrain data index"):
        load_manifest(str(tmp_path))
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(ManifestError, match=r"unfinished.*goes on where it stopped"):
        load_manifest(str(tmp_path))
    with pytest.raises(ShardError, match="no file"):
        load_manifest(str(tmp_path / "nothing"))


@pytest.mark.parametrize("name", ["../part-0.tar", "/part-0.tar", "part-0.txt", "a/../../b.tar", "a\0.tar"])
def test_manifest_cannot_name_files_outside_its_folder(dataset: Path, tmp_path: Path, name: str) -> None:
    root = copy(dataset, tmp_path / "copy")
    content = json.loads((root / "manifest.json").read_text())
    content["names"][0] = name
    (root / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(ManifestError, match="inside this folder"):
        load_manifest(str(root))


@pytest.mark.parametrize(
    "change",
    [
        {"num_samples": [1, 2]},
        {"num_bytes": [-1, 0, 0]},
        {"sha256": ["x", "y", "z"]},
        {"names": ["part-0.tar"] * 3},
        {"format": "another"},
        {"surprise": 1},
        {"classes": "abc"},
    ],
)
def test_manifest_of_wrong_content_is_refused(dataset: Path, tmp_path: Path, change: dict[str, object]) -> None:
    root = copy(dataset, tmp_path / "copy")
    content = json.loads((root / "manifest.json").read_text()) | change
    (root / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(ManifestError, match=r"manifest\.json"):
        load_manifest(str(root))


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damage_to_manifest_or_index_gives_our_errors_only(dataset: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["manifest.json", "part-0.idx"]))
    content = bytearray((dataset / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))]
    damaged = dataset.parent / f"damaged-{name}"
    damaged.write_bytes(content)
    with contextlib.suppress(ManifestError):
        if name == "manifest.json":
            found = Manifest.read(damaged)
            assert len(found.names) == len(found.num_samples) == len(found.num_bytes) == len(found.sha256)
            assert (found.num_samples >= 0).all()
        else:
            index = ShardIndex.load(damaged)
            assert len(index.keys[:]) == len(index.offsets) == len(index)


@given(names=st.lists(st.text()), counts=st.lists(st.integers(0, 2**62)), at_once=st.integers(1, 5))
def test_json_in_pieces_is_that_of_the_whole(names: list[str], counts: list[int], at_once: int) -> None:
    assert "".join(_as_json([names, counts, names], at_once)) == json.dumps([names, counts, names])


@settings(max_examples=100, deadline=None)
@given(keys=st.lists(st.text(st.characters(codec="utf-8"))))
def test_keys_are_the_strings_they_were_made_of(keys: list[str]) -> None:
    packed = Keys.of(keys)
    assert list(packed) == keys
    assert packed[:] == keys
    assert packed[1::2] == keys[1::2]
    if keys:
        assert packed[-1] == keys[-1]
    with pytest.raises(IndexError):
        packed[len(keys)]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("offsets", np.array([[10**9, 0]])),
        ("offsets", np.array([[-5, 0]])),
        ("sizes", np.array([[-1, 0]])),
        ("sizes", np.array([[2**62, 2**62]])),
        ("labels", np.array([0, 1])),
        ("crc32", np.array([[1, 1]])),
        ("keys", Keys(np.zeros(2, np.uint8), np.array([7]))),
        ("keys", Keys(np.full(1, 0xFF, np.uint8), np.array([1]))),
        ("shard_bytes", 10**30),
        ("shard_bytes", -1),
    ],
)
def test_index_that_cannot_be_is_refused(tmp_path: Path, field: str, value: object) -> None:
    good = ShardIndex(
        keys=Keys.of(["a"]),
        fields=("cls", "jpg"),
        offsets=np.array([[MISSING, 512]]),
        sizes=np.array([[0, 100]]),
        crc32=np.zeros((1, 2), np.uint32),
        labels=np.array([NO_LABEL]),
        shard_sha256="0" * 64,
        shard_bytes=10240,
    )
    good.save(tmp_path / "good.idx")
    assert list(ShardIndex.load(tmp_path / "good.idx").keys) == ["a"]
    replace(good, **{field: value}).save(tmp_path / "bad.idx")  # type: ignore[arg-type]
    with pytest.raises(ManifestError, match=r"bad\.idx"):
        ShardIndex.load(tmp_path / "bad.idx")


def test_a_pattern_that_names_a_shard_twice_is_refused_by_all_alike(dataset: Path, tmp_path: Path) -> None:
    """Reading, indexing and converting; nothing is written. The same word for shards behind a URL."""
    folder = copy(dataset, tmp_path / "data")
    name = load_manifest(str(folder)).names[0]
    pattern = f"{folder}/{{{name.removesuffix('.tar')},{name.removesuffix('.tar')}}}.tar"
    told = []
    for refused in (
        lambda: open_training(pattern),
        lambda: index_shards(pattern),
        lambda: convert(Path(pattern), tmp_path / "out", ConvertOptions()),
        lambda: split_url(f"http://host{pattern}"),
    ):
        with pytest.raises(ShardError, match=f"expected each shard once, found {name} named more than once") as caught:
            refused()
        told.append(str(caught.value).replace("http://host", ""))
    assert len(set(told)) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["manifest.json", "shard-000000.idx"])
def test_a_file_that_storage_does_not_give_is_not_to_be_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def fail(path: Path, *_: str) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO), path)

    for read in ("read_text", "read_bytes"):
        monkeypatch.setattr(Path, read, fail)
    with pytest.raises(ManifestError, match=r"Input/output error\. Look at the storage first") as error:
        Manifest.read(tmp_path / name) if name.endswith("json") else ShardIndex.load(tmp_path / name)
    assert not re.search("emove|again", str(error.value))
