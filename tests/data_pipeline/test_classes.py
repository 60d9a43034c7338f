"""Where sets of labels meet, names of classes decide: numbers of one become those of the other, or it is refused."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.batch import BatchSpec
from data_pipeline.datasets.choose import confident, ranked
from data_pipeline.datasets.classes import Relabeled, label_notes, match_classes
from data_pipeline.datasets.dataset import Dataset, Part
from data_pipeline.datasets.mixture import Mixture, overlap_notes
from data_pipeline.datasets.read import FolderDataset, ShardDataset
from data_pipeline.datasets.selection import Selected
from data_pipeline.datasets.soft_labeled import SoftLabeled
from data_pipeline.errors import FieldError, SampleError
from data_pipeline.loader import evaluation_batches
from tests.data_pipeline.test_labels import write_labels
from tests.data_pipeline.tiny import evaluated, loader, photo, steps, write_shards

PETS = ("cat", "dog", "owl")


def named(folder: Path, names: Sequence[str] | None, size: int = 6) -> ShardDataset:
    """Sample i is of class i % K in this data set's own numbers, whatever their names."""
    dataset = write_shards(folder, [size], num_classes=len(names) if names else 3)
    return ShardDataset(replace(dataset.manifest, classes=tuple(names) if names else None))


def folder_of_classes(root: Path, names: Sequence[str]) -> FolderDataset:
    for number, name in enumerate(names):
        (root / name).mkdir(parents=True)
        (root / name / "0.jpg").write_bytes(photo(number))
    return FolderDataset(root)


def labels(dataset: Dataset, num_classes: int = 3) -> list[int]:
    spec = BatchSpec(8, num_classes=num_classes)
    batches = evaluation_batches(dataset, spec, evaluated(8), batch_size=4, max_pixels=10**6)
    return [int(label) for batch in batches if batch.labels is not None for label in batch.labels]


def test_numbers_become_those_of_the_names(tmp_path: Path) -> None:
    train, val = folder_of_classes(tmp_path / "train", PETS), folder_of_classes(tmp_path / "val", ["dog", "owl"])
    assert labels(val) == [0, 1]
    mapped = match_classes(val, train, "data.val", "data.train")
    assert labels(mapped) == [1, 2]
    assert mapped.classes == PETS
    assert mapped.label_counts is not None
    assert mapped.label_counts.tolist() == [0, 1, 1]
    assert mapped.fingerprint == val.fingerprint, "the same images"
    assert mapped.state != val.state, "features are kept with their labels"
    assert mapped.origin(1) == val.origin(1)
    assert labels(pickle.loads(pickle.dumps(mapped))) == [1, 2]
    assert label_notes(train, mapped) == [
        "labels of data.val are numbered by their names as in data.train: 2 of its 3 classes"
    ]


def test_another_order_and_shards_against_a_folder(tmp_path: Path) -> None:
    val = named(tmp_path / "val", ["owl", "cat", "dog"])
    assert labels(match_classes(val, folder_of_classes(tmp_path / "train", PETS), "val", "train")) == [2, 0, 1] * 2


def test_what_agrees_already_stays_as_it_is(tmp_path: Path) -> None:
    one, other = named(tmp_path / "one", PETS), named(tmp_path / "other", PETS)
    twice = named(tmp_path / "twice", ["crane", "crane", "owl"])
    bare = named(tmp_path / "bare", None)
    for dataset, reference in ((other, one), (twice, twice), (bare, named(tmp_path / "more", None))):
        assert match_classes(dataset, reference, "val", "train") is dataset
        assert label_notes(reference, dataset) == []


def test_names_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    train = named(tmp_path / "train", PETS)
    with pytest.raises(FieldError, match=r"classes of data\.val and data\.train: .*found emu, eel, which data\.train"):
        match_classes(named(tmp_path / "val", ["cat", "emu", "eel"]), train, "data.val", "data.train")
    twice = named(tmp_path / "twice", ["owl", "owl", "dog"])
    with pytest.raises(FieldError, match="found owl more than once"):
        match_classes(twice, train, "data.val", "data.train")
    with pytest.raises(FieldError, match="found owl more than once"):
        match_classes(named(tmp_path / "single", ["dog", "owl"]), twice, "data.val", "data.train")


def test_names_that_no_sample_has_need_not_fit(tmp_path: Path) -> None:
    val = named(tmp_path / "val", ["dog", "owl"])
    padded = replace(val.manifest, classes=("dog", "owl", "emu"), label_counts=np.array([3, 3, 0]))
    train = named(tmp_path / "train", PETS)
    mapped = match_classes(ShardDataset(padded), train, "val", "train")
    assert labels(mapped) == [1, 2] * 3
    wrong = replace(padded, label_counts=np.array([6, 0, 0]))  # says that no sample is an owl
    with pytest.raises(SampleError, match=r"0001\.cls: expected one of the labels that were counted"):
        match_classes(ShardDataset(wrong), train, "val", "train").read(1)


@pytest.mark.parametrize(("train", "val"), [(PETS, None), (None, PETS)])
def test_names_against_bare_numbers_are_refused(
    tmp_path: Path, train: Sequence[str] | None, val: Sequence[str] | None
) -> None:
    sets = named(tmp_path / "train", train), named(tmp_path / "val", val)
    bare = "data.val" if val is None else "data.train"
    with pytest.raises(FieldError, match=rf"names in .* alone: cat, dog, owl\. Name those of {bare}: .*manifest\.json"):
        match_classes(sets[1], sets[0], "data.val", "data.train")


def test_a_set_without_labels_is_left_to_whoever_needs_them(tmp_path: Path) -> None:
    bare = write_shards(tmp_path / "bare", [3], num_classes=None)
    train = named(tmp_path / "train", PETS)
    assert match_classes(bare, train, "val", "train") is bare
    assert match_classes(train, bare, "val", "train") is train


class TestMixtures:
    def test_sources_take_the_classes_of_the_one_that_has_all(self, tmp_path: Path) -> None:
        few, all_of_them = named(tmp_path / "few", ["owl", "dog"]), named(tmp_path / "all", PETS)
        both = Mixture([Part("few", few, 1), Part("all", all_of_them, 1)])
        assert both.classes == PETS
        assert both.label_counts is not None
        assert both.label_counts.tolist() == [2, 2 + 3, 2 + 3]
        assert labels(both) == [2, 1] * 3 + [0, 1, 2] * 2
        identity = json.dumps(
            [[each.fingerprint, int(n)] for each, n in zip((few, all_of_them), both.slots, strict=True)]
        )
        assert both.fingerprint == sha256(identity.encode()).hexdigest(), "what was trained without labels goes on"
        seen = [batch for step in steps(loader(both), 0, 3) for batch in step.micro_batches]
        own = {f"0:{i:04d}": [2, 1][i % 2] for i in range(6)} | {f"1:{i:04d}": i % 3 for i in range(6)}
        for batch in seen:
            assert batch.labels is not None
            assert batch.labels.tolist() == [own[key] for key in batch.keys]
        assert label_notes(both, None) == ["labels of few are numbered by their names as in all: 2 of its 3 classes"]

    def test_a_source_of_bare_numbers_beside_names_is_refused_where_labels_are_needed(self, tmp_path: Path) -> None:
        both = Mixture([Part("a", named(tmp_path / "a", PETS), 1), Part("b", named(tmp_path / "b", None), 1)])
        with pytest.raises(FieldError, match=r"classes of a and b: .*names in a alone"):
            loader(both)
        with pytest.raises(FieldError, match=r"classes of a and b"):
            match_classes(both, both, "val", "train")


class TestSoftLabels:
    @pytest.fixture
    def data(self, tmp_path: Path) -> ShardDataset:
        return write_shards(tmp_path / "data", [4, 3])

    def test_rows_of_a_teacher_are_laid_out_by_its_names(self, data: ShardDataset, tmp_path: Path) -> None:
        soft = SoftLabeled(data, write_labels(tmp_path / "soft", data, classes=["owl", "cat", "dog"]))
        both = Mixture([Part("soft", soft, 1), Part("true", named(tmp_path / "true", ["emu", *PETS]), 1)])
        assert both.num_soft_classes == 4
        assert both.read(0).label == pytest.approx([0, *np.roll(soft.read(0).label, -1)])  # type: ignore[arg-type]
        for step in steps(loader(both, BatchSpec(8, num_classes=4)), 0, 2):
            (batch,) = step.micro_batches
            assert batch.labels is not None
            assert batch.labels.sum(1).tolist() == pytest.approx([1] * 4)

    def test_a_teacher_whose_classes_are_not_there_is_refused(self, data: ShardDataset, tmp_path: Path) -> None:
        soft = SoftLabeled(data, write_labels(tmp_path / "soft", data, classes=["owl", "cat", "emu"]))
        with pytest.raises(FieldError, match="found emu, which train"):
            match_classes(soft, named(tmp_path / "true", PETS), "soft", "train")

    def test_labels_without_names_are_taken_by_number_which_is_said(self, data: ShardDataset, tmp_path: Path) -> None:
        soft = SoftLabeled(data, write_labels(tmp_path / "soft", data))
        val = named(tmp_path / "val", PETS)
        assert match_classes(val, soft, "data.val", "data.train") is val
        (note,) = label_notes(soft, val)
        assert note.startswith("the soft labels of data.train do not name their classes: they are taken by number")
        assert label_notes(soft, None) == []

    def test_a_selection_keeps_the_names_of_its_teacher(self, data: ShardDataset, tmp_path: Path) -> None:
        names = ["owl", "cat", "dog"]
        soft = write_labels(tmp_path / "soft", data, classes=names)
        ranked(soft, top_k=2, per_sample=3).save(tmp_path / "ranked")
        confident(soft, threshold=0.1, per_class=2).save(tmp_path / "confident")
        by_rank = Selected(data, tmp_path / "ranked")
        mapped = match_classes(by_rank, named(tmp_path / "val", PETS), "soft", "train")
        own = [by_rank.read(i).label for i in range(by_rank.num_samples)]
        assert [mapped.read(i).label for i in range(by_rank.num_samples)] == [[2, 0, 1][int(n)] for n in own]  # type: ignore[arg-type]
        assert Selected(SoftLabeled(data, soft), tmp_path / "confident").classes == tuple(names)
        unnamed = write_labels(tmp_path / "unnamed", data)
        ranked(unnamed, top_k=2, per_sample=3).save(tmp_path / "by number")
        assert Selected(data, tmp_path / "by number").classes is None


def test_a_view_stays_a_view_of_the_shards(tmp_path: Path) -> None:
    val = named(tmp_path / "val", ["dog", "owl"])
    mapped = match_classes(val, named(tmp_path / "train", PETS), "val", "train")
    assert isinstance(mapped, Relabeled)
    assert mapped.beneath() == (val, None)


def test_shards_that_two_sources_share_are_told_whatever_their_classes_are_called(tmp_path: Path) -> None:
    one = named(tmp_path / "one", PETS)
    other = ShardDataset(replace(one.manifest, classes=("owl", "dog", "cat")))
    mixture = Mixture([Part("one", one, 1), Part("other", other, 1)])
    assert isinstance(mixture.parts[1].dataset, Relabeled)
    assert overlap_notes(mixture) == [
        "data.train: other shares 1 of its shards with one: they are seen by the weights of both"
    ]
