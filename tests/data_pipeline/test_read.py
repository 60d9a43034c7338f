"""Reading: webdataset's samples out of webdataset's tars, every byte checked; and image folders."""

from __future__ import annotations

import io
import os
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from data_pipeline.batch import Sample
from data_pipeline.datasets import read
from data_pipeline.datasets.dataset import Dataset
from data_pipeline.datasets.folders import open_source
from data_pipeline.datasets.read import FolderDataset, ShardDataset, open_dataset
from data_pipeline.datasets.selection import Subset
from data_pipeline.errors import DataError, SampleError, ShardError, SourceError
from data_pipeline.ingest.convert import ConvertOptions, convert
from data_pipeline.shards.scan import index_shards
from tests.data_pipeline.tiny import photo, write_shards


def all_samples(dataset: Dataset) -> list[Sample]:
    return [dataset.read(i) for i in range(dataset.num_samples)]


def open_tars(folder: Path) -> list[int]:
    """This process's descriptors of the tars in `folder`."""
    paths = {name: Path(os.path.realpath(f"/proc/self/fd/{name}")) for name in os.listdir("/proc/self/fd")}
    return [int(name) for name, path in paths.items() if path.parent == folder and path.suffix == ".tar"]


def test_webdatasets_reader_yields_the_same_samples(tmp_path: Path) -> None:
    dataset = write_shards(tmp_path, [3, 0, 1, 5], replaced={4: {"png": b"two", "left.txt": b"dots", "cls": b"1"}})
    urls = sorted(str(path) for path in tmp_path.glob("*.tar"))
    theirs = [
        (sample["__key__"], {name: data for name, data in sample.items() if not name.startswith("__")})
        for sample in webdataset.WebDataset(urls, shardshuffle=False, empty_check=False)
    ]
    assert [(sample.key, dict(sample.fields)) for sample in all_samples(dataset)] == theirs
    assert len(theirs) == 9


def test_webdatasets_reader_yields_the_same_photographs(shared_data: Path, tmp_path: Path) -> None:
    os.symlink(shared_data / "photos.tar", tmp_path / "photos.tar")
    index_shards(str(tmp_path))
    urls = str(tmp_path / "photos.tar")
    theirs = {s["__key__"]: s["jpeg"] for s in webdataset.WebDataset(urls, shardshuffle=False)}
    assert {s.key: s.fields["jpeg"] for s in all_samples(open_dataset(str(tmp_path)))} == theirs
    assert len(theirs) == 64


def test_a_sample_is_told_by_key_and_shard(tmp_path: Path) -> None:
    dataset = write_shards(tmp_path, [2, 0, 2])
    assert [dataset.origin(i) for i in range(4)] == [
        ("0000", "part-000.tar"),
        ("0001", "part-000.tar"),
        ("0002", "part-002.tar"),
        ("0003", "part-002.tar"),
    ]
    with pytest.raises(IndexError):
        dataset.read(4)
    with pytest.raises(IndexError):
        dataset.read(-1)


def test_a_changed_byte_is_told_by_shard_key_and_field(tmp_path: Path) -> None:
    dataset = write_shards(tmp_path, [3])
    index, shard = dataset.manifest.index(0), tmp_path / "part-000.tar"
    column = index.fields.index("jpg")
    data = bytearray(shard.read_bytes())
    data[int(index.offsets[1, column]) + 5] ^= 1
    shard.write_bytes(data)
    dataset.read(0)
    with pytest.raises(SampleError, match=r"part-000.tar: 0001.jpg: expected .* crc32 .* verify"):
        dataset.read(1)
    dataset.read(2)


def test_a_shard_that_got_shorter_is_told(tmp_path: Path) -> None:
    dataset = write_shards(tmp_path, [3])
    os.truncate(tmp_path / "part-000.tar", int(dataset.manifest.index(0).offsets[2].max()) + 1)
    dataset.read(1)
    with pytest.raises(SampleError, match=r"0002.jpg: expected .* found 1 bytes"):
        dataset.read(2)


def test_a_shard_that_is_gone_is_told(tmp_path: Path) -> None:
    dataset = write_shards(tmp_path, [3])
    (tmp_path / "part-000.tar").unlink()
    with pytest.raises(ShardError, match=r"part-000\.tar"):
        dataset.read(0)


def test_open_files_are_bounded_and_let_go_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read, "_OPEN_SHARDS", 3)
    dataset = write_shards(tmp_path, [1] * 8)
    for i in [0, 1, 2, 3, 4, 5, 6, 7, 0, 7, 3]:
        assert dataset.read(i).key == f"{i:04d}"
        assert len(open_tars(tmp_path)) <= 3
    del dataset
    assert open_tars(tmp_path) == []


def test_reading_moves_no_file_position(tmp_path: Path) -> None:
    """Workers share the descriptors that were open before they were forked, and a position with them."""
    dataset = write_shards(tmp_path, [4, 3])
    all_samples(dataset)
    assert [os.lseek(descriptor, 0, os.SEEK_CUR) for descriptor in open_tars(tmp_path)] == [0, 0]


def test_a_data_set_can_be_sent_to_a_spawned_process(tmp_path: Path) -> None:
    dataset = write_shards(tmp_path, [2, 1])
    dataset.read(0)
    assert all_samples(pickle.loads(pickle.dumps(dataset))) == all_samples(dataset)


@pytest.mark.parametrize("field", ["pyd", "meta.pickle", "pkl"])
def test_pickles_are_refused(tmp_path: Path, field: str) -> None:
    manifest = write_shards(tmp_path, [1]).manifest
    with pytest.raises(ShardError, match=rf"pickles.*\.{field}"):
        ShardDataset(replace(manifest, fields=("jpg", field)))


@pytest.mark.parametrize("spec", ["pipe:touch {}/ran", "ftp://host/a.tar", "file:///a", "gs://bucket/{{0..3}}.tar"])
def test_schemes_are_refused_and_nothing_is_run(tmp_path: Path, spec: str) -> None:
    with pytest.raises(DataError, match="local"):
        open_dataset(spec.format(tmp_path))
    assert not (tmp_path / "ran").exists()


def write_folder(root: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)


def test_class_folders_are_labels_in_the_order_of_their_names(tmp_path: Path) -> None:
    write_folder(
        tmp_path,
        {"dog/b.JPG": photo(0), "cat/sub/a.png": b"png", "dog/a.jpeg": photo(1), "cat/note.txt": b"no image"},
    )
    dataset = open_dataset(str(tmp_path))
    assert isinstance(dataset, FolderDataset)
    assert [(s.key, dict(s.fields)) for s in all_samples(dataset)] == [
        ("cat/sub/a", {"png": b"png", "cls": b"0"}),
        ("dog/a", {"jpeg": photo(1), "cls": b"1"}),
        ("dog/b", {"jpg": photo(0), "cls": b"1"}),
    ]
    assert dataset.classes == ("cat", "dog")
    assert dataset.label_counts is not None
    assert dataset.label_counts.tolist() == [1, 2]
    assert dataset.fields == ("cls", "jpg", "jpeg", "png")
    assert dataset.shard_sizes.tolist() == [1, 1, 1]
    assert dataset.origin(1) == ("dog/a", "dog/a.jpeg")


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    write_folder(tmp_path, {"a.png": b"1", "b.png": b"2"})
    (tmp_path / "more").mkdir()
    dataset = open_dataset(str(tmp_path))
    assert dataset.classes is None
    assert dataset.label_counts is None
    assert [dict(s.fields) for s in all_samples(dataset)] == [{"png": b"1"}, {"png": b"2"}]


LAYOUTS = {
    "classes": (["cat/1.png", "cat/old/2.png", "dog/1.png"], ["cat", "cat", "dog"]),
    "below shared folders": (["set/images/cat/1.png", "set/images/dog/1.png"], ["cat", "dog"]),
    "one folder": (["photos/1.png", "photos/2.png"], [None, None]),
    "one split": (["train/cat/1.png", "train/dog/1.png"], ["cat", "dog"]),
    "splits": (["test/cat/1.png", "train/cat/1.png"], None),
    "splits and others": (["cat/1.png", "test/cat/1.png", "train/cat/1.png"], None),
    "a stray picture": (["cat/1.png", "dog/1.png", "preview.png"], None),
    "names alike": (["cat/1.bmp", "cat/1.png", "dog/1.png"], ["cat", "cat", "dog"]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_is_read_as_a_conversion_reads_it(tmp_path: Path, layout: str) -> None:
    names, classes = LAYOUTS[layout]
    root, out = tmp_path / "in", tmp_path / "out"
    write_folder(root, {name: picture(name) for name in names})
    if classes is None:
        for read in (lambda: open_dataset(str(root)), lambda: convert(root, out, ConvertOptions())):
            with pytest.raises(SourceError):
                read()
        return
    convert(root, out, ConvertOptions(shuffle=False))
    for dataset in (open_dataset(str(root)), open_dataset(str(out))):
        found = [(sample.fields.get("cls"), sample.fields[sample_field(sample)]) for sample in all_samples(dataset)]
        named = [dataset.classes[int(label)] if label and dataset.classes else None for label, _ in found]
        assert named == classes
        assert [data for _, data in found] == [picture(name) for name in names]
        assert len({sample.key for sample in all_samples(dataset)}) == len(names)


def picture(name: str) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (4, 4), (len(name), 0, 0)).save(data, "BMP" if name.endswith("bmp") else "PNG")
    return data.getvalue()


def sample_field(sample: Sample) -> str:
    return next(field for field in sample.fields if field != "cls")


def test_the_fingerprint_of_a_folder_follows_its_files(tmp_path: Path) -> None:
    write_folder(tmp_path / "a", {"x/1.png": b"1", "y/2.png": b"2"})
    write_folder(tmp_path / "b", {"x/1.png": b"1", "y/2.png": b"2"})
    first, same = (open_dataset(str(tmp_path / name)).fingerprint for name in "ab")
    (tmp_path / "b" / "y" / "2.png").write_bytes(b"22")
    longer = open_dataset(str(tmp_path / "b")).fingerprint
    (tmp_path / "a" / "y" / "2.png").rename(tmp_path / "a" / "y" / "3.png")
    renamed = open_dataset(str(tmp_path / "a")).fingerprint
    assert first == same
    assert len({first, longer, renamed}) == 3


def test_the_state_of_a_folder_follows_what_the_fingerprint_cannot_see(tmp_path: Path) -> None:
    """A BMP is as large as any other of its size; and a copy elsewhere is the same data."""
    write_folder(tmp_path / "a", {"x/1.bmp": b"1"})
    before = open_dataset(str(tmp_path / "a"))
    again = open_dataset(str(tmp_path / "a"))
    (tmp_path / "a" / "x" / "1.bmp").write_bytes(b"2")
    os.utime(tmp_path / "a" / "x" / "1.bmp", ns=(1, 1))
    after = open_dataset(str(tmp_path / "a"))
    assert before.fingerprint == again.fingerprint == after.fingerprint
    assert before.state == again.state != after.state
    halves = [Subset(dataset, np.array([0]), None) for dataset in (before, after)]
    assert halves[0].fingerprint == halves[1].fingerprint
    assert halves[0].state != halves[1].state


def test_what_lies_beside_images_is_passed_over_as_a_conversion_does(tmp_path: Path) -> None:
    write_folder(
        tmp_path,
        {
            "cat/a.png": b"1",
            "dog/b.pgm": b"2",
            "cat/._a.png": b"",
            ".ipynb_checkpoints/a-checkpoint.png": b"1",
            "__MACOSX/cat/a.png": b"",
            "readme.txt": b"",
        },
    )
    (tmp_path / ".#readme.txt").symlink_to("somebody@host.4711")  # an editor's
    dataset = open_dataset(str(tmp_path))
    assert dataset.classes == ("cat", "dog")
    assert [dataset.origin(i)[1] for i in range(dataset.num_samples)] == ["cat/a.png", "dog/b.pgm"]
    assert [entry.name for entry in open_source(tmp_path, tmp_path).images] == ["cat/a.png", "dog/b.pgm"]


def test_a_class_folder_without_images_is_refused_by_name(tmp_path: Path) -> None:
    write_folder(tmp_path, {"cat/a.png": b"1", "eel/b.jp2": b"2"})
    (tmp_path / "fox" / "later").mkdir(parents=True)
    with pytest.raises(DataError, match=r"images in each class folder, found none in eel, fox\."):
        open_dataset(str(tmp_path))
    with pytest.raises(SourceError, match="none in fox"):
        convert(tmp_path, tmp_path / "out", ConvertOptions())


def test_links_in_a_circle_are_refused(tmp_path: Path) -> None:
    write_folder(tmp_path, {"cat/a.png": b"1"})
    (tmp_path / "cat" / "up").symlink_to(tmp_path)
    with pytest.raises(DataError, match=r"cat/up: .* a link that leads to a folder met before"):
        open_dataset(str(tmp_path))


def test_pictures_in_formats_that_are_not_read_are_samples_that_cannot_be_used(tmp_path: Path) -> None:
    heic = b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic" + bytes(8)
    write_folder(tmp_path, {"cat/a.png": b"1", "cat/b.HEIC": heic, "cat/c.heic": photo(0), "dog/a.png": b"1"})
    dataset = open_dataset(str(tmp_path))
    assert dataset.num_samples == 4
    with pytest.raises(SampleError, match=r"cat/b\.HEIC: expected .* found HEIC\. Convert it to JPEG, .*heif-convert"):
        dataset.read(1)
    assert dataset.read(2).fields["jpg"] == photo(0)


def test_an_image_that_vanished_is_a_bad_sample(tmp_path: Path) -> None:
    write_folder(tmp_path, {"x/1.png": b"1"})
    dataset = open_dataset(str(tmp_path))
    (tmp_path / "x" / "1.png").unlink()
    with pytest.raises(SampleError, match=r"1\.png"):
        dataset.read(0)


@pytest.mark.parametrize("files", [{}, {"readme.txt": b"hello"}])
def test_a_folder_without_images_says_what_to_give(tmp_path: Path, files: dict[str, bytes]) -> None:
    write_folder(tmp_path, files)
    with pytest.raises(DataError, match=r"images .* or shards"):
        open_dataset(str(tmp_path))


def test_tars_without_a_manifest_are_not_taken_for_an_image_folder(tmp_path: Path) -> None:
    write_shards(tmp_path, [1])
    (tmp_path / "manifest.json").unlink()
    write_folder(tmp_path, {"x/1.png": b"1"})
    with pytest.raises(DataError, match="pretrain data index"):
        open_dataset(str(tmp_path))


def test_a_pattern_opens_its_shards_only(tmp_path: Path) -> None:
    whole = write_shards(tmp_path, [2, 3, 4])
    part = open_dataset(str(tmp_path / "part-{000..001}.tar"))
    assert all_samples(part) == all_samples(whole)[:5]
    assert np.array_equal(part.shard_sizes, [2, 3])
    assert part.fingerprint != whole.fingerprint
