"""What names say: splits, classes, labels and keys."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from webdataset.tariterators import base_plus_ext

from data_pipeline.datasets.folders import open_source
from data_pipeline.datasets.layout import read_layout
from data_pipeline.errors import SourceError
from data_pipeline.ingest.layout import arrange, unique_keys

HERE = Path("source")


def labelled(names: list[str], split_by_folder: bool = False) -> dict[str, dict[str, str | None]]:
    """{split: {name: its class}}."""
    layout = read_layout(names, [], HERE, split_by_folder=split_by_folder)
    return {
        split: {
            names[i]: None if label is None else layout.classes[label]
            for i, label in zip(found.numbers, found.labels, strict=True)
        }
        for split, found in arrange(layout).items()
    }


def test_first_folder_below_the_shared_ones_is_the_class() -> None:
    names = ["set/images/cat/1.jpg", "set/images/cat/old/2.jpg", "set/images/dog/1.jpg"]
    assert labelled(names) == {"": dict(zip(names, ["cat", "cat", "dog"], strict=True))}


def test_images_in_no_folder_have_no_label() -> None:
    assert labelled(["a.jpg", "b.jpg"]) == {"": {"a.jpg": None, "b.jpg": None}}
    assert labelled(["photos/a.jpg", "photos/b.jpg"]) == {"": {"photos/a.jpg": None, "photos/b.jpg": None}}


@pytest.mark.parametrize("top", ["", "cifar/", "data/cifar/"])
def test_splits_share_one_list_of_classes(top: str) -> None:
    names = sorted(f"{top}{name}" for name in ["test/cat/1.jpg", "train/dog/1.jpg", "val/1.jpg", "val/2.jpg"])
    layout = read_layout(names, [], HERE, split_by_folder=True)
    splits = arrange(layout)
    assert layout.classes == ["cat", "dog"]
    assert [(split, found.labels) for split, found in splits.items()] == [
        ("test", [0]),
        ("train", [1]),
        ("val", [None, None]),
    ]
    assert splits["test"].keys == ["test/cat/1"]


def test_one_split_alone_is_still_a_split() -> None:
    assert labelled(["x/train/a/1.jpg", "x/train/b/1.jpg"], True) == {
        "train": {"x/train/a/1.jpg": "a", "x/train/b/1.jpg": "b"}
    }


@pytest.mark.parametrize(
    ("names", "split_by_folder", "reason"),
    [
        (["test/cat/1.jpg", "train/cat/1.jpg"], False, r"source: .*splits are \(test, train\)\. Give one of these"),
        (["set/Train/1.jpg", "set/Val/1.jpg"], False, r"source/set: .*splits are \(Train, Val\)\. Give one of these"),
        (["sample/cat/1.jpg", "test/cat/1.jpg", "train/cat/1.jpg"], False, "Give one of these"),
        (["preview.jpg", "test/cat/1.jpg", "train/cat/1.jpg"], False, "Give one of these"),
        (["cat/1.jpg", "train/cat/1.jpg"], True, "'cat'"),
        (["a/1.jpg", "b.jpg"], False, r"beside the folders, such as 'b\.jpg'"),
        (["set/images/a/1.jpg", "set/images/b/1.jpg", "set/preview.jpg"], False, r"such as 'preview\.jpg'"),
        (["test/1.jpg", "train/1.jpg", "train/cat/1.jpg"], True, r"source/train: .*such as 'train/1\.jpg'"),
    ],
)
def test_what_is_ambiguous_is_refused(names: list[str], split_by_folder: bool, reason: str) -> None:
    with pytest.raises(SourceError, match=reason):
        read_layout(names, [], HERE, split_by_folder=split_by_folder)


def test_a_class_may_be_called_as_a_split_is() -> None:
    assert labelled(["bus/1.jpg", "train/1.jpg"])[""] == {"bus/1.jpg": "bus", "train/1.jpg": "train"}


def test_folders_without_images_beside_class_folders_are_named() -> None:
    names = ["set/images/cat/1.jpg", "set/images/dog/1.jpg"]
    others = [
        "set/images/eel/notes.txt",
        "set/images/fox/",
        "set/images/.cache/x",
        "set/images/list.txt",
        "set/masks/a",
    ]
    assert read_layout(names, others, HERE).empty == ["eel", "fox"]
    assert read_layout(["a.jpg"], ["eel/notes.txt"], HERE).empty == []
    names, others = ["test/cat/1.jpg", "train/cat/1.jpg"], ["docs/readme.md", "train/dog/1.txt", "test/cat/x.txt"]
    assert read_layout(names, others, HERE, split_by_folder=True).empty == ["dog"]


@settings(max_examples=200, deadline=None)
@given(
    names=st.lists(
        st.lists(st.text(st.sampled_from("ab._~2\\\né"), min_size=1, max_size=6), min_size=1, max_size=3)
        .map("/".join)
        .map(lambda name: f"{name}.jpg"),
        unique=True,
    )
)
def test_webdataset_reads_back_every_key_and_no_key_twice(names: list[str]) -> None:
    keys = unique_keys(names)
    assert len(set(keys)) == len(names)
    for key in keys:
        assert base_plus_ext(f"{key}.cls") == (key, "cls")
        assert not key.startswith("__")


def test_cifar10_is_understood(shared_data: Path, tmp_path: Path) -> None:
    source = open_source(shared_data / "cifar10.tar.gz", tmp_path)
    layout = read_layout([entry.name for entry in source.images], source.others, HERE, split_by_folder=True)
    splits, classes = arrange(layout), layout.classes
    assert (len(classes), classes[0], classes[9]) == (10, "airplane", "truck")
    assert {split: len(found.keys) for split, found in splits.items()} == {"test": 10_000, "train": 50_000}
    assert splits["train"].keys[0] == "train/airplane/0000"
    assert splits["train"].labels.count(9) == 5000
