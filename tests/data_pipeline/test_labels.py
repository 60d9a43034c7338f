"""Soft labels and selections beside shards: joined by key, refused where they are of other data, order as ever."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.batch import BatchSpec
from data_pipeline.datasets.choose import confident, labeled, ranked
from data_pipeline.datasets.config import Source
from data_pipeline.datasets.dataset import Dataset
from data_pipeline.datasets.read import ShardDataset
from data_pipeline.datasets.selection import Selected, Selection, Subset
from data_pipeline.datasets.soft_labels import (
    Described,
    ShardLabels,
    SoftLabels,
    crc32_of,
    file_name,
    read_file,
    write_labels_file,
)
from data_pipeline.datasets.training import open_training
from data_pipeline.errors import DataError, FieldError, ManifestError, SampleError, ShardError
from tests.data_pipeline.tiny import loader, rows_of, steps, write_shards

SIZES = [5, 0, 7, 6]
SPEC = BatchSpec(8, num_classes=3)


def result_label(key: str) -> np.ndarray:
    """Soft, of a key: the largest is not at the true class."""
    row = np.roll([0.5, 0.25, 0.25], int(key) % 3 + 1)
    return np.array(row, np.float16)


def write_labels(folder: Path, dataset: ShardDataset, keys: Sequence[str] | None = None, **other: object) -> SoftLabels:
    """Labels of each sample as `result_label` has them; `keys` in the place of the samples' own."""
    folder.mkdir(parents=True, exist_ok=True)
    keys = keys or [dataset.origin(i)[0] for i in range(dataset.num_samples)]
    digests, end = [], 0
    for shard, size in enumerate(dataset.shard_sizes.tolist()):
        own, end = keys[end : end + size], end + size
        values = np.array([result_label(key) for key in own], np.float16).reshape(size, 3)
        (folder / file_name(shard)).write_bytes(ShardLabels(values, None, crc32_of(own)).to_bytes({}))
        digests.append(read_file(folder / file_name(shard))[2])
    described = {
        "data_fingerprint": dataset.fingerprint, "num_classes": 3, "top_k": None, "teacher": {},
        "num_samples": dataset.shard_sizes.tolist(), "sha256": digests, **other,
    }  # fmt: skip
    write_labels_file(folder, Described(**described))  # type: ignore[arg-type]
    return SoftLabels(folder)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardDataset:
    return write_shards(tmp_path_factory.mktemp("shards"), SIZES)


@pytest.fixture
def path(shards: ShardDataset) -> str:
    return str(shards.manifest.root)


@pytest.fixture
def soft(shards: ShardDataset, tmp_path: Path) -> Path:
    write_labels(tmp_path / "labels", shards)
    return tmp_path / "labels"


def test_each_sample_has_the_label_of_its_key(path: str, soft: Path) -> None:
    dataset = open_training([Source(path=path, labels=str(soft))])
    for i in range(18):
        sample = dataset.read(i)
        assert isinstance(sample.label, np.ndarray)
        assert sample.label.dtype == np.float32
        assert np.array_equal(sample.label, result_label(sample.key).astype(np.float32))
    (step,) = steps(loader(dataset, SPEC, global_size=9), 0, 1)
    (batch,) = step.micro_batches
    assert batch.labels is not None
    assert batch.labels.dtype == torch.float32
    for key, row in zip(batch.keys, batch.labels, strict=True):
        assert np.array_equal(row.numpy(), result_label(key).astype(np.float32))


def test_what_is_drawn_and_in_what_order_does_not_depend_on_the_labels(path: str, soft: Path) -> None:
    plain, labelled_ = open_training(path), open_training([Source(path=path, labels=str(soft))])
    spec = BatchSpec(8, num_views=2)
    one, other = (steps(loader(d, spec), 5, 6) for d in (plain, labelled_))
    assert [rows_of(step) for step in one] == [rows_of(step) for step in other]


def test_hard_and_soft_sources_mix(path: str, soft: Path, shards: ShardDataset, tmp_path: Path) -> None:
    few = labeled(shards, per_class=2, seed=0)
    few.save(tmp_path / "few")
    mixture = open_training(
        [Source(path=path, select=str(tmp_path / "few")), Source(path=path, weight=3, labels=str(soft))]
    )
    assert mixture.num_samples == 6 + 18
    seen: Counter[str] = Counter()
    for step in steps(loader(mixture, SPEC, global_size=8, num_workers=0), 0, 12):
        for batch in step.micro_batches:
            assert batch.labels is not None
            for key, row in zip(batch.keys, batch.labels, strict=True):
                source, own = key.split(":")
                hard = np.eye(3)[int(own) % 3]
                assert np.array_equal(row.numpy(), hard if source == "0" else result_label(own).astype(np.float32))
                seen[source] += 1
    assert seen["0"] > 0
    assert seen["1"] > 2 * seen["0"]


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_the_rest_of_the_probability_is_spread_evenly(data: st.DataObject) -> None:
    num_classes = data.draw(st.integers(2, 9))
    k = data.draw(st.integers(1, num_classes))
    weights = np.array(data.draw(st.lists(st.integers(1, 99), min_size=num_classes, max_size=num_classes)), float)
    full = weights / weights.sum()
    best = np.argsort(-full, kind="stable")[:k]
    labels = ShardLabels(full[best][None].astype(np.float16), best[None].astype(np.int32), np.zeros(1, np.uint32))
    (row,) = labels.rows(0, 1, num_classes)
    assert row.dtype == np.float32
    assert row.sum() == pytest.approx(1, abs=1e-6)
    assert row[best] == pytest.approx(full[best], abs=2e-3)
    others = [row[c] for c in range(num_classes) if c not in best]
    assert len(set(others)) <= 1
    if others:
        assert others[0] == pytest.approx((1 - full[best].sum()) / len(others), abs=2e-3)


def test_a_selection_is_read_entry_by_entry_and_repeats_are_drawn_anew(
    path: str, soft: Path, shards: ShardDataset, tmp_path: Path
) -> None:
    labels = SoftLabels(soft)
    chosen = confident(labels, threshold=0.3, per_class=9)
    chosen.save(tmp_path / "select")
    dataset = open_training([Source(path=path, labels=str(soft), select=str(tmp_path / "select"))])
    assert dataset.num_samples == 27
    keys = [dataset.read(i).key for i in range(27)]
    assert len(set(keys)) == 27
    assert {key.partition("#")[0] for key in keys} == {f"{i:04d}" for i in range(18)}
    assert [dataset.origin(i)[0] for i in range(27)] == keys
    for i in range(27):
        sample = dataset.read(i)
        assert np.array_equal(sample.label, result_label(sample.key.partition("#")[0]).astype(np.float32))  # type: ignore[arg-type]
    seen: dict[str, list[torch.Tensor]] = {}
    epoch: Counter[str] = Counter()
    for step in steps(loader(dataset, SPEC, global_size=3), 0, 9):
        for batch in step.micro_batches:
            for key, view in zip(batch.keys, batch.views[0], strict=True):
                epoch[key] += 1
                seen.setdefault(key.partition("#")[0], []).append(view)
    assert set(epoch) == set(keys)
    assert set(epoch.values()) == {1}, "each entry once in an epoch"
    assert any(not torch.equal(views[0], views[1]) for views in seen.values() if len(views) > 1)


def test_a_selected_source_is_the_same_for_any_ranks_and_workers(path: str, soft: Path, tmp_path: Path) -> None:
    confident(SoftLabels(soft), threshold=0.3, per_class=9).save(tmp_path / "select")
    dataset = open_training([Source(path=path, labels=str(soft), select=str(tmp_path / "select"))])
    whole = [row for step in steps(loader(dataset, SPEC), 8, 4) for row in rows_of(step)]
    ranks = [steps(loader(dataset, SPEC, rank=r, world_size=2, num_workers=1), 8, 4) for r in range(2)]
    assert [row for pair in zip(*ranks, strict=True) for step in pair for row in rows_of(step)] == whole


def test_top_k_samples_have_the_class_they_are_listed_under(path: str, soft: Path, tmp_path: Path) -> None:
    chosen = ranked(SoftLabels(soft), top_k=7, per_sample=3)
    chosen.save(tmp_path / "select")
    dataset = open_training([Source(path=path, select=str(tmp_path / "select"))])
    assert dataset.label_counts is not None
    assert dataset.label_counts.tolist() == [7, 7, 7]
    assert chosen.labels is not None
    assert [dataset.read(i).label for i in range(21)] == chosen.labels.tolist()
    (step,) = steps(loader(dataset, SPEC, global_size=21), 0, 1)
    assert step.micro_batches[0].labels is not None
    assert torch.bincount(step.micro_batches[0].labels).tolist() == [7, 7, 7]


def test_selection_and_labels_are_in_the_fingerprint(
    path: str, soft: Path, shards: ShardDataset, tmp_path: Path
) -> None:
    for name, per_class in (("a", 2), ("b", 3)):
        labeled(shards, per_class=per_class, seed=0).save(tmp_path / name)
    others = [
        open_training(path),
        open_training([Source(path=path, select=str(tmp_path / "a"))]),
        open_training([Source(path=path, select=str(tmp_path / "b"))]),
        open_training([Source(path=path, labels=str(soft))]),
    ]
    assert len({dataset.fingerprint for dataset in others}) == 4


def test_shards_hold_what_a_view_counts(path: str, soft: Path, shards: ShardDataset, tmp_path: Path) -> None:
    chosen = confident(SoftLabels(soft), threshold=0.3, per_class=9)
    chosen.save(tmp_path / "select")
    view = open_training([Source(path=path, labels=str(soft), select=str(tmp_path / "select"))])
    base, indices = view.beneath()
    assert indices is not None
    assert base.fingerprint == shards.fingerprint
    assert view.shard_sizes.sum() == view.num_samples
    by_shard = np.bincount(shards.shards_in(indices), minlength=4)
    assert view.shard_sizes.tolist() == by_shard.tolist()
    assert shards.beneath() == (shards, None)


def test_an_opened_view_travels_to_other_processes(path: str, soft: Path) -> None:
    dataset = open_training([Source(path=path, labels=str(soft))])
    first = dataset.read(0).label
    again: Dataset = pickle.loads(pickle.dumps(dataset))
    assert np.array_equal(again.read(0).label, first)  # type: ignore[arg-type]


class TestRefused:
    def test_labels_of_other_shards(self, soft: Path, tmp_path: Path) -> None:
        other = write_shards(tmp_path / "other", [5, 0, 7, 5])
        with pytest.raises(FieldError, match=r"data\.train\.0\.labels"):
            open_training([Source(path=str(other.manifest.root), labels=str(soft))])

    def test_a_missing_file(self, path: str, soft: Path) -> None:
        (soft / file_name(2)).unlink()
        with pytest.raises(ManifestError, match=file_name(2)):
            open_training([Source(path=path, labels=str(soft))])

    def test_unfinished_labels(self, path: str, soft: Path) -> None:
        (soft / "labels.json").rename(soft / "plan.json")
        with pytest.raises(ManifestError, match="unfinished"):
            open_training([Source(path=path, labels=str(soft))])

    def test_a_description_that_is_damaged(self, path: str, soft: Path) -> None:
        described = json.loads((soft / "labels.json").read_text())
        for change in ({"num_samples": [1]}, {"top_k": 9}, {"num_classes": "3"}, {"more": 1}):
            (soft / "labels.json").write_text(json.dumps(described | change))
            with pytest.raises(ManifestError, match=r"labels\.json"):
                open_training([Source(path=path, labels=str(soft))])

    def test_changed_bytes(self, path: str, soft: Path) -> None:
        file = soft / file_name(0)
        file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
        dataset = open_training([Source(path=path, labels=str(soft))])
        with pytest.raises(ShardError, match=file_name(0)):
            dataset.read(0)

    def test_a_row_of_another_key(self, path: str, shards: ShardDataset, tmp_path: Path) -> None:
        keys = [shards.origin(i)[0] for i in range(18)]
        keys[3], keys[4] = keys[4], keys[3]
        write_labels(tmp_path / "swapped", shards, keys)
        dataset = open_training([Source(path=path, labels=str(tmp_path / "swapped"))])
        dataset.read(2)
        for i in (3, 4):
            with pytest.raises(SampleError, match="another key"):
                dataset.read(i)

    def test_another_number_of_classes(self, path: str, soft: Path) -> None:
        dataset = open_training([Source(path=path), Source(path=path, labels=str(soft))])
        with pytest.raises(FieldError, match="num_classes"):
            loader(dataset, BatchSpec(8, num_classes=4))

    def test_a_selection_of_other_data(self, shards: ShardDataset, tmp_path: Path) -> None:
        labeled(shards, per_class=2, seed=0).save(tmp_path / "few")
        other = write_shards(tmp_path / "other", [5, 0, 7, 5])
        with pytest.raises(FieldError, match=r"data\.train\.0\.select"):
            open_training([Source(path=str(other.manifest.root), select=str(tmp_path / "few"))])

    def test_a_selection_without_its_labels_or_with_others(
        self, path: str, soft: Path, shards: ShardDataset, tmp_path: Path
    ) -> None:
        confident(SoftLabels(soft), threshold=0.3, per_class=2).save(tmp_path / "soft")
        labeled(shards, per_class=2, seed=0).save(tmp_path / "hard")
        top = write_labels(tmp_path / "more", shards, teacher={"another": 1}, num_classes=4)
        for share in (
            Source(path=path, select=str(tmp_path / "soft")),
            Source(path=path, select=str(tmp_path / "hard"), labels=str(soft)),
            Source(path=path, select=str(tmp_path / "soft"), labels=str(top.folder)),
        ):
            with pytest.raises(FieldError, match=r"data\.train\.0\.select"):
                open_training([share])

    @pytest.mark.parametrize("content", [b"", b"\x10\0\0\0\0\0\0\0{}", b"no selection at all"])
    def test_no_selection(self, path: str, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "select").write_bytes(content)
        with pytest.raises(ManifestError, match="a selection"):
            open_training([Source(path=path, select=str(tmp_path / "select"))])

    def test_labels_beside_an_image_folder(self, soft: Path, tmp_path: Path) -> None:
        (tmp_path / "images").mkdir()
        with pytest.raises(DataError):
            open_training([Source(path=str(tmp_path / "images"), labels=str(soft))])


def test_a_subset_has_the_chosen_samples_and_an_identity_of_its_own(shards: ShardDataset, tmp_path: Path) -> None:
    part = Subset(shards, np.array([3, 7, 17]), np.array([1, 2]))
    assert [part.read(i).key for i in range(3)] == [shards.read(i).key for i in (3, 7, 17)]
    assert part.origin(1) == shards.origin(7)
    assert part.shard_sizes.sum() == part.num_samples == 3
    assert len(part.shard_sizes) == len(shards.shard_sizes)
    others = [Subset(shards, np.array(indices), None).fingerprint for indices in ([3, 7, 16], [3, 7])]
    assert len({shards.fingerprint, part.fingerprint, *others}) == 4
    base, indices = Subset(part, np.array([0, 2]), None).beneath()
    assert base is shards
    assert indices is not None
    assert indices.tolist() == [3, 17]


def test_selected_is_a_dataset(shards: ShardDataset, tmp_path: Path) -> None:
    labeled(shards, per_class=3, seed=1).save(tmp_path / "few")
    view: Dataset = Selected(shards, tmp_path / "few")
    selection, _ = Selection.load(tmp_path / "few")
    assert view.classes == shards.classes
    assert [view.origin(i)[1] for i in range(9)] == [shards.origin(int(i))[1] for i in selection.indices]
