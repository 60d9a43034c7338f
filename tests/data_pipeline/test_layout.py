"""What names say: splits, classes, labels and keys."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from webdataset.tariterators import base_plus_ext

from data_pipeline.datasets.folders import open_source
from data_pipeline.errors import SourceError
from data_pipeline.ingest.layout import arrange, unique_keys

HERE = Path("source")


def labelled(names: list[str], split_by_folder: bool = False) -> dict[str, dict[str, str | None]]:
    """{split: {name: its class}}."""
    splits, classes = arrange(names, split_by_folder, HERE)
    return {
        split: {
            names[i]: None if label is None else classes[label]
            for i, label in zip(found.numbers, found.labels, strict=True)
        }
        for split, found in splits.items()
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
    splits, classes = arrange(names, True, HERE)
    assert classes == ["cat", "dog"]
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


def test_what_is_ambiguous_is_refused() -> None:
    with pytest.raises(SourceError, match="Give --split-by-folder"):
        arrange(["test/cat/1.jpg", "train/cat/1.jpg"], False, HERE)
    with pytest.raises(SourceError, match="'cat'"):
        arrange(["cat/1.jpg", "train/cat/1.jpg"], True, HERE)
    with pytest.raises(SourceError, match=r"beside the folders, such as 'b\.jpg'"):
        arrange(["a/1.jpg", "b.jpg"], False, HERE)


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
    splits, classes = arrange([entry.name for entry in source.images], True, HERE)
    assert (len(classes), classes[0], classes[9]) == (10, "airplane", "truck")
    assert {split: len(found.keys) for split, found in splits.items()} == {"test": 10_000, "train": 50_000}
    assert splits["train"].keys[0] == "train/airplane/0000"
    assert splits["train"].labels.count(9) == 5000
