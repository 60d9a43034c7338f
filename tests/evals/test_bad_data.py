"""Data that no number can be trusted of: an error that names it, or a note in the report; never a number alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import webdataset

from data_pipeline.datasets.read import open_dataset
from data_pipeline.errors import DataError, InputError, RunError
from data_pipeline.shards.scan import index_shards
from pretrain.evals.features.extract import Extraction
from pretrain.evals.features.store import FeatureStore
from pretrain.evals.knn.config import KnnConfig
from pretrain.evals.knn.protocol import Knn
from pretrain.evals.linear.config import LinearConfig
from pretrain.evals.linear.protocol import Linear
from pretrain.evals.result import EvalReport
from tests.evals.conftest import Folders, small_encoder


@pytest.fixture
def copied(folders: Folders, tmp_path: Path) -> Folders:
    for name, folder in (("train", folders.train), ("test", folders.test)):
        shutil.copytree(folder, tmp_path / name)
    return Folders(str(tmp_path / "train"), str(tmp_path / "test"))


def judge(kind: str, data: Folders, store: Path | None = None) -> EvalReport:
    extraction = Extraction(store=FeatureStore(store) if store else None, num_workers=1)
    train, test = open_dataset(data.train), open_dataset(data.test)
    if kind == "knn":
        asked = KnnConfig(train=data.train, test=data.test, k=5)
        return Knn(train, test, asked, extraction=extraction).run(small_encoder())
    config = LinearConfig(train="", test="", learning_rates=(0.1,), min_steps=20)
    return Linear(train, test, config, extraction=extraction).run(small_encoder())


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("kind", ["knn", "linear"])
@pytest.mark.parametrize("damage", ["cut short", "no image", "empty"])
def test_an_image_that_does_not_decode_is_left_out_named_and_counted(
    copied: Folders, tmp_path: Path, split: str, kind: str, damage: str
) -> None:
    victim = sorted(Path(getattr(copied, split)).rglob("*.jpg"))[7]
    content = victim.read_bytes()
    victim.write_bytes({"cut short": content[:200], "no image": b"GIF8" * 50, "empty": b""}[damage])
    victim.unlink()
    without = judge(kind, copied)
    victim.write_bytes({"cut short": content[:200], "no image": b"GIF8" * 50, "empty": b""}[damage])
    report = judge(kind, copied, tmp_path / "features")
    assert report.data["left_out"] == {split: 1}
    (note,) = [note for note in report.notes if "left out" in note]
    assert f"1 of {100 if split == 'test' else 300} {split} samples" in note
    assert victim.stem in note
    assert victim.name in note
    assert report.n == without.n == (99 if split == "test" else 100)
    assert report.value == without.value
    assert judge(kind, copied, tmp_path / "features").data["left_out"] == {split: 1}  # from the store, too
    victim.write_bytes(content)
    assert "left_out" not in judge(kind, copied, tmp_path / "features").data


def test_more_than_the_budget_ends_the_evaluation(copied: Folders) -> None:
    for victim in sorted(Path(copied.test).rglob("*.jpg"))[:3]:
        victim.write_bytes(b"no image")
    train, test = open_dataset(copied.train), open_dataset(copied.test)
    asked = KnnConfig(train=copied.train, test=copied.test, k=5)
    assert Knn(train, test, asked, extraction=Extraction(max_bad_samples=3)).run(small_encoder()).n == 97
    with pytest.raises(RunError, match=r"features of test.*at most 2 samples.*found 3 that cannot be used.*verify"):
        Knn(train, test, asked, extraction=Extraction(max_bad_samples=2)).run(small_encoder())


def test_a_set_without_any_usable_sample_is_no_number(copied: Folders) -> None:
    for victim in Path(copied.test).rglob("*.jpg"):
        victim.write_bytes(b"no image")
    with pytest.raises(DataError, match="expected a sample that can be used"):
        judge("knn", copied)


def test_augmented_views_are_of_the_samples_that_are_left(copied: Folders) -> None:
    victim = sorted(Path(copied.train).rglob("*.jpg"))[0]
    victim.write_bytes(b"no image")
    config = LinearConfig(train="", test="", learning_rates=(0.1,), min_steps=5, augment=True)
    report = Linear(open_dataset(copied.train), open_dataset(copied.test), config).run(small_encoder())
    assert report.data["left_out"] == {"train": 1}


def sharded(folder: str, out: Path, leave_out: str) -> str:
    """The images as a shard whose labels are numbers, without those of one class."""
    out.mkdir()
    with webdataset.TarWriter(str(out / "part-0000.tar")) as tar:
        for path in sorted(Path(folder).rglob("*.jpg")):
            if path.parent.name != leave_out:
                tar.write({"__key__": path.stem, "jpg": path.read_bytes(), "cls": path.parent.name})
    index_shards(str(out), classes=[str(k) for k in range(10)])
    return str(out)


@pytest.mark.parametrize("kind", ["knn", "linear"])
def test_a_class_without_training_samples_is_counted(folders: Folders, tmp_path: Path, kind: str) -> None:
    data = Folders(sharded(folders.train, tmp_path / "train", "3"), sharded(folders.test, tmp_path / "test", ""))
    report = judge(kind, data)
    lost = len(list((Path(folders.test) / "3").iterdir()))
    assert report.notes == [f"1 of 10 classes have no training sample: {lost} of 100 test samples cannot be right"]
    assert not report.outcomes.correct[report.outcomes.labels == 3].any()
    assert report.n == 100


@pytest.mark.parametrize("kind", ["knn", "linear"])
def test_a_class_without_test_samples_is_counted(folders: Folders, tmp_path: Path, kind: str) -> None:
    data = Folders(sharded(folders.train, tmp_path / "train", ""), sharded(folders.test, tmp_path / "test", "3"))
    report = judge(kind, data)
    assert report.notes == ["1 of 10 classes have no test sample"]
    assert report.n == open_dataset(data.test).num_samples < 100


def test_a_class_folder_that_is_missing_makes_the_classes_differ(copied: Folders) -> None:
    shutil.rmtree(Path(copied.train) / "3")
    with pytest.raises(InputError, match="found 3, which the training set does not have"):
        judge("knn", copied)
