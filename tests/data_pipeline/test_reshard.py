"""Other shards -> ours: every member arrives, in new shards; pickles and damage are refused."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import webdataset

from data_pipeline.errors import DataError, ShardError, SourceError
from data_pipeline.ingest.convert import ConvertOptions, convert
from data_pipeline.inspect.stats import _caption, stats
from data_pipeline.shards.load_manifest import load_manifest
from data_pipeline.shards.scan import index_shards
from tests.data_pipeline.archives import as_folder, contents, jpeg
from tests.data_pipeline.test_convert import SMALL, png, samples, shards

Sample = tuple[str, Mapping[str, bytes]]


def write_tar(path: Path, rows: Sequence[Sample]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, members in rows:
            for field, data in members.items():
                header = tarfile.TarInfo(f"{key}.{field}")
                header.size = len(data)
                tar.addfile(header, io.BytesIO(data))
    return path


def downloaded(i: int) -> Sample:
    """As img2dataset writes it: image, caption, and what it knows of both."""
    told = {"caption": f"caption {i}", "url": f"http://host/{i}.jpg", "status": "success", "key": f"{i:09d}"}
    return f"{i:09d}", {"jpg": jpeg(i), "txt": f"caption {i}".encode(), "json": json.dumps(told).encode()}


@pytest.fixture
def laion(tmp_path: Path) -> Path:
    """Three tars of img2dataset, with what it leaves beside them."""
    for tar, numbers in enumerate(([0, 1, 2, 3, 4, 5, 6], [7], [8, 9, 10, 11])):
        write_tar(tmp_path / f"laion/{tar:05d}.tar", [downloaded(i) for i in numbers])
        as_folder(tmp_path / "laion", {f"{tar:05d}.parquet": b"PAR1", f"{tar:05d}_stats.json": b"{}"})
    return tmp_path / "laion"


def read(folder: Path) -> dict[str, dict[str, Any]]:
    found = {}
    for sample in samples(folder):
        found[sample["__key__"]] = {k: v for k, v in sample.items() if not k.startswith("__")}
    return found


@pytest.mark.parametrize("spec", ["{}", "{}/{{00000..00002}}.tar"])
def test_what_img2dataset_wrote_arrives_whole(laion: Path, tmp_path: Path, spec: str) -> None:
    before = contents(laion)
    done = convert(Path(spec.format(laion)), tmp_path / "out", SMALL)
    assert contents(laion) == before
    assert read(tmp_path / "out") == dict(downloaded(i) for i in range(12))
    manifest = done.manifests[tmp_path / "out"]
    assert (manifest.fields, manifest.label_counts) == (("jpg", "json", "txt"), None)
    assert manifest.num_samples.tolist() == [4, 4, 4]
    order = [key for shard in range(3) for key in manifest.index(shard).keys]
    assert order != sorted(order)


def test_processes_and_indexes_that_are_there_change_nothing(laion: Path, tmp_path: Path) -> None:
    convert(laion, tmp_path / "alone", SMALL)
    convert(laion, tmp_path / "two", SMALL, workers=2)
    index_shards(str(laion))
    convert(laion, tmp_path / "indexed", SMALL)
    assert contents(tmp_path / "alone") == contents(tmp_path / "two") == contents(tmp_path / "indexed")


def test_only_the_tars_of_a_pattern_are_taken(laion: Path, tmp_path: Path) -> None:
    convert(laion / "{00001..00002}.tar", tmp_path / "out", SMALL)
    index_shards(str(laion))
    convert(laion / "{00001..00002}.tar", tmp_path / "again", SMALL)
    assert len(read(tmp_path / "out")) == 5
    assert shards(tmp_path / "out") == shards(tmp_path / "again")


def test_images_labels_and_anything_else_of_any_layout(tmp_path: Path) -> None:
    rows: list[Sample] = [
        ("./deep/a", {"cls": b"2", "seg.png": png(4, 4), "JPEG": jpeg(0), "npy": b"numbers"}),
        ("./deep/b", {"cls": b"0", "webp": png(5, 5)}),
    ]
    write_tar(tmp_path / "in/x.tar", rows)
    done = convert(tmp_path / "in", tmp_path / "out", SMALL)
    assert read(tmp_path / "out") == {
        "deep/a": {"cls": b"2", "seg.png": png(4, 4), "jpg": jpeg(0), "npy": b"numbers"},
        "deep/b": {"cls": b"0", "png": png(5, 5)},
    }
    counts = done.manifests[tmp_path / "out"].label_counts
    assert counts is not None
    assert counts.tolist() == [1, 0, 1]


def test_equal_keys_of_two_tars_stay_apart_and_classes_are_kept(tmp_path: Path) -> None:
    for name in "ab":
        write_tar(tmp_path / f"in/{name}.tar", [("0", {"jpg": jpeg(ord(name)), "cls": b"1"})])
    index_shards(str(tmp_path / "in"), classes=["cat", "dog"])
    convert(tmp_path / "in", tmp_path / "out", SMALL)
    assert {key: sample["jpg"] for key, sample in read(tmp_path / "out").items()} == {"0": jpeg(97), "0~2": jpeg(98)}
    assert load_manifest(str(tmp_path / "out")).classes == ("cat", "dog")


def test_ours_again_with_other_sizes(laion: Path, tmp_path: Path) -> None:
    convert(laion, tmp_path / "once", SMALL)
    convert(tmp_path / "once", tmp_path / "twice", ConvertOptions(shard_size=100, short_side=5))
    assert set(read(tmp_path / "twice")) == set(read(tmp_path / "once"))
    assert len(load_manifest(str(tmp_path / "twice")).names) == 1


def test_captions_may_be_taken_from_elsewhere(tmp_path: Path) -> None:
    told = json.dumps({"texts": ["one", "two\nlines"], "text": "only\none"}).encode()
    write_tar(tmp_path / "in/x.tar", [("0", {"jpg": jpeg(0), "json": told, "caption": b"other"})])
    for field, expected in (("json:texts", b"one\ntwo lines"), ("json:text", b"only one"), ("caption", b"other")):
        out = tmp_path / field
        convert(tmp_path / "in", out, SMALL, caption_field=field)
        assert read(out)["0"]["txt"] == expected
        assert ("caption" in read(out)["0"]) == (field != "caption")


def test_bad_samples_are_told_all_at_once_and_may_be_skipped(laion: Path, tmp_path: Path) -> None:
    bad: list[Sample] = [
        ("a", {"jpg": b"no image", "txt": b"words"}),
        ("b", {"txt": b"words"}),
        ("c", {"jpg": jpeg(0), "txt": b""}),
        ("d", {"jpg": jpeg(0), "txt": b"\xff"}),
        ("e", {"jpg": png(4, 4), "png": png(5, 5)}),
    ]
    write_tar(laion / "bad.tar", bad)
    with pytest.raises(SourceError, match="5 that cannot") as caught:
        convert(laion, tmp_path / "out", SMALL)
    assert all(f"bad.tar: {key}" in str(caught.value) for key in "abcde")
    done = convert(laion, tmp_path / "out", SMALL, skip_bad=True)
    assert done.manifests[tmp_path / "out"].total == 12
    assert done.num_images == 17


@pytest.mark.parametrize("field", ["pkl", "pyd", "pth"])
def test_pickles_are_refused(tmp_path: Path, field: str) -> None:
    write_tar(tmp_path / "in/x.tar", [("0", {"jpg": jpeg(0), field: pickle.dumps([1])})])
    with pytest.raises(ShardError, match="a pickle, which is a program"):
        convert(tmp_path / "in", tmp_path / "out", SMALL, skip_bad=True)
    assert not (tmp_path / "out").exists()


def test_a_damaged_tar_is_refused_as_a_whole(laion: Path, tmp_path: Path) -> None:
    data = (laion / "00002.tar").read_bytes()
    (laion / "00002.tar").write_bytes(data[: 3 * 512])
    with pytest.raises(ShardError, match=r"00002\.tar, offset"):
        convert(laion, tmp_path / "out", SMALL, skip_bad=True)
    assert not (tmp_path / "out").exists()


def test_bytes_that_changed_since_they_were_indexed_are_bad_samples(laion: Path, tmp_path: Path) -> None:
    index_shards(str(laion))
    data = bytearray((laion / "00001.tar").read_bytes())
    data[700] ^= 1
    (laion / "00001.tar").write_bytes(data)
    done = convert(laion, tmp_path / "out", SMALL, skip_bad=True)
    assert [error.found for error in done.bad] == ["other bytes"]


def test_a_conversion_does_not_go_on_with_other_shards(laion: Path, tmp_path: Path) -> None:
    convert(laion, tmp_path / "out", SMALL)
    write_tar(laion / "00003.tar", [downloaded(12)])
    with pytest.raises(DataError, match="source = "):
        convert(laion, tmp_path / "out", SMALL)


def test_its_output_is_read_by_webdataset(laion: Path, tmp_path: Path) -> None:
    convert(laion, tmp_path / "out", SMALL)
    tars = [str(path) for path in sorted((tmp_path / "out").glob("*.tar"))]
    read_back = list(webdataset.WebDataset(tars, shardshuffle=False).decode("rgb8").to_tuple("jpg", "txt"))
    assert len(read_back) == 12


@pytest.mark.parametrize("beside", ["cat/1.jpg", "1.JPEG"])
def test_tars_beside_images_are_not_guessed_about(laion: Path, tmp_path: Path, beside: str) -> None:
    as_folder(laion, {beside: jpeg(0), "_tmp/x": b""})
    with pytest.raises(SourceError, match=r"found both: .*brace pattern"):
        convert(laion, tmp_path / "out", SMALL)
    convert(laion / "{00000..00002}.tar", tmp_path / "out", SMALL)


def test_the_contact_sheet_shows_captions_where_there_are_no_labels(laion: Path, tmp_path: Path) -> None:
    convert(laion, tmp_path / "with", SMALL)
    manifest = load_manifest(str(tmp_path / "with"))
    assert _caption(manifest, {"txt": "a  \n Grüße".encode()}) == "a Grüße"
    assert _caption(manifest, {"txt": b"\xff words", "cls": b"7"}) == "7"
    assert _caption(manifest, {"txt": b"\xff words"}) == "\ufffd words"
    stats(str(tmp_path / "with"), tmp_path / "sheet.png")
    other = tmp_path / "other"
    rows = [(key, {**members, "txt": b"unlike the others"}) for key, members in map(downloaded, range(12))]
    write_tar(tmp_path / "in/x.tar", rows)
    convert(tmp_path / "in", other, SMALL)
    stats(str(other), tmp_path / "others.png")
    assert (tmp_path / "sheet.png").read_bytes() != (tmp_path / "others.png").read_bytes()
