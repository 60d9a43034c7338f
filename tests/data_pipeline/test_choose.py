"""What is chosen by soft or true labels, against twins written as loops; and that it scales."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipeline.datasets import choose
from data_pipeline.datasets.choose import confident, labeled, ranked
from data_pipeline.datasets.selection import Selection
from data_pipeline.datasets.soft_labels import (
    Described,
    ShardLabels,
    SoftLabels,
    file_name,
    read_file,
    write_labels_file,
)
from data_pipeline.errors import DataError
from tests.data_pipeline.tiny import write_shards

SOME = settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
Drawn = tuple[np.ndarray, list[int], int | None]  # probabilities [N, K] fp16, sizes of shards, top_k


@st.composite
def drawn_labels(draw: st.DrawFn) -> Drawn:
    sizes = draw(st.lists(st.integers(0, 6), min_size=1, max_size=4).filter(any))
    num_classes = draw(st.integers(2, 5))
    # Few different values, so that many are equal.
    values = st.lists(st.sampled_from([1, 2, 3, 9]), min_size=num_classes, max_size=num_classes)
    rows = [draw(values) for _ in range(sum(sizes))]
    table = np.array(rows, np.float32)
    top_k = draw(st.none() | st.integers(1, num_classes))
    return (table / table.sum(1, keepdims=True)).astype(np.float16), sizes, top_k


def written(folder: Path, drawn: Drawn) -> SoftLabels:
    table, sizes, top_k = drawn
    folder.mkdir(parents=True, exist_ok=True)
    digests = []
    for shard, end in enumerate(np.cumsum(sizes)):
        values, classes = table[end - sizes[shard] : end], None
        if top_k is not None:
            classes = np.argsort(-values.astype(np.float32), axis=1, kind="stable")[:, :top_k].astype(np.int32)
            values = np.take_along_axis(values, classes, 1)
        labels = ShardLabels(np.ascontiguousarray(values), classes, np.zeros(sizes[shard], np.uint32))
        (folder / file_name(shard)).write_bytes(labels.to_bytes({}))
        digests.append(read_file(folder / file_name(shard))[2])
    described = Described(
        data_fingerprint="0" * 64,
        num_classes=table.shape[1],
        top_k=top_k,
        teacher={},
        num_samples=sizes,
        sha256=digests,
    )
    write_labels_file(folder, described)
    return SoftLabels(folder)


def entries(selection: Selection) -> list[tuple[int, int]]:
    """(index, repeat) in the order of the file."""
    return list(zip(selection.indices.tolist(), selection.repeats.tolist(), strict=True))


def naive_confident(table: np.ndarray, threshold: float, per_class: int | None, without: set[int]) -> Counter[int]:
    """How often each sample is taken."""
    by_class: dict[int, list[tuple[float, int]]] = {}
    for i, row in enumerate(table.tolist()):
        best = max(row)
        if best > threshold and i not in without:
            by_class.setdefault(row.index(best), []).append((-best, i))
    taken: Counter[int] = Counter()
    for found in by_class.values():
        found.sort()
        count = len(found) if per_class is None else per_class
        for j in range(count):
            taken[found[j % len(found)][1]] += 1
    return taken


@SOME
@given(
    drawn=drawn_labels(),
    threshold=st.sampled_from([0.0, 0.2, 0.3, 0.5]),
    per_class=st.none() | st.integers(1, 9),
    without=st.sets(st.integers(0, 8)),
)
def test_confident_takes_what_a_loop_takes(
    tmp_path_factory: pytest.TempPathFactory, drawn: Drawn, threshold: float, per_class: int | None, without: set[int]
) -> None:
    labels = written(tmp_path_factory.mktemp("labels"), drawn)
    wanted = naive_confident(drawn[0], threshold, per_class, without)
    left_out = np.array(sorted(without), np.int64)
    if not wanted:
        with pytest.raises(DataError, match="--threshold"):
            confident(labels, threshold=threshold, per_class=per_class, without=left_out)
        return
    found = confident(labels, threshold=threshold, per_class=per_class, without=left_out)
    assert entries(found) == sorted((i, r) for i, count in wanted.items() for r in range(count))
    assert found.labels is None, "samples keep their soft labels"
    if per_class is not None:
        predicted = Counter(int(drawn[0][i].argmax()) for i in found.indices)
        assert set(predicted.values()) == {per_class}


@SOME
@given(drawn=drawn_labels(), top_k=st.integers(1, 9), per_sample=st.integers(1, 6), without=st.sets(st.integers(0, 8)))
@pytest.mark.parametrize("merged", [1, 10**6], ids=["merged often", "merged once"])
def test_ranked_takes_what_a_loop_takes(
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    drawn: Drawn,
    top_k: int,
    per_sample: int,
    without: set[int],
    merged: int,
) -> None:
    monkeypatch.setattr(choose, "_MERGED", merged)
    monkeypatch.setattr(choose, "_ROWS", 2)
    table, _, kept = drawn
    labels = written(tmp_path_factory.mktemp("labels"), drawn)
    wanted = []
    for c in range(table.shape[1]):
        candidates = []
        for i, row in enumerate(table.tolist()):
            best = sorted(range(len(row)), key=lambda k: (-row[k], k))[:per_sample]
            if c in best and i not in without:
                candidates.append((-row[c], i))
        wanted += [(i, c) for _, i in sorted(candidates)[:top_k]]
    left_out = np.array(sorted(without), np.int64)
    if kept is not None and kept < min(per_sample, table.shape[1]):
        with pytest.raises(DataError, match=rf"--per-image: expected at most {kept},.* found {per_sample}\."):
            ranked(labels, top_k=top_k, per_sample=per_sample, without=left_out)
        return
    if not wanted:
        with pytest.raises(DataError):
            ranked(labels, top_k=top_k, per_sample=per_sample, without=left_out)
        return
    found = ranked(labels, top_k=top_k, per_sample=per_sample, without=left_out)
    assert found.labels is not None
    assert list(zip(found.indices.tolist(), found.labels.tolist(), strict=True)) == sorted(wanted)
    assert len(set(entries(found))) == len(found), "each listing of a sample has a number of its own"


def test_of_true_labels_as_many_of_each_and_others_by_another_seed(tmp_path: Path) -> None:
    dataset = write_shards(tmp_path, [5, 0, 7, 18])
    found = labeled(dataset, per_class=4, seed=0)
    assert found.labels is not None
    assert np.array_equal(found.labels, found.indices % 3), "the labels of the shards"
    assert Counter(found.labels.tolist()) == {0: 4, 1: 4, 2: 4}
    assert len(set(found.indices.tolist())) == 12
    assert np.array_equal(labeled(dataset, per_class=4, seed=0).indices, found.indices)
    assert not np.array_equal(labeled(dataset, per_class=4, seed=1).indices, found.indices)
    rest = labeled(dataset, per_class=6, seed=3, without=found.indices)
    assert not set(rest.indices.tolist()) & set(found.indices.tolist())
    assert len(rest) == 18
    with pytest.raises(DataError, match="--per-class"):
        labeled(dataset, per_class=7, seed=3, without=found.indices)


def test_equal_choices_give_equal_bytes(tmp_path: Path) -> None:
    dataset = write_shards(tmp_path / "data", [9, 9])
    labeled(dataset, per_class=4, seed=0).save(tmp_path / "a")
    labeled(dataset, per_class=4, seed=0).save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert Selection.load(tmp_path / "a")[0].rule == {"kind": "labelled", "per_class": 4, "seed": 0}


def test_two_million_samples_take_little_memory(tmp_path: Path) -> None:
    """Columns of a few bytes a sample: a Python object for each would be hundreds of megabytes."""
    rng = np.random.default_rng(0)
    table = rng.random((100_000, 10), np.float32)
    drawn = (table / table.sum(1, keepdims=True)).astype(np.float16)
    labels = ShardLabels(drawn, None, np.zeros(100_000, np.uint32))
    (tmp_path / file_name(0)).write_bytes(labels.to_bytes({}))
    digest = read_file(tmp_path / file_name(0))[2]
    for shard in range(1, 20):
        (tmp_path / file_name(shard)).hardlink_to(tmp_path / file_name(0))
    described = Described(
        data_fingerprint="0" * 64,
        num_classes=10,
        top_k=None,
        teacher={},
        num_samples=[100_000] * 20,
        sha256=[digest] * 20,
    )
    write_labels_file(tmp_path, described)
    code = r"""if True:
        import sys, tracemalloc
        from pathlib import Path
        from data_pipeline.datasets.choose import confident, ranked
        from data_pipeline.datasets.soft_labels import SoftLabels

        tracemalloc.start()  # numpy tells it of its arrays; what is mapped from files does not count
        labels = SoftLabels(Path(sys.argv[1]))
        a = confident(labels, threshold=0.15, per_class=100_000)
        b = ranked(labels, top_k=20_000, per_sample=10)
        print(len(a), len(b), tracemalloc.get_traced_memory()[1] / 1e6)
    """
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    num_confident, num_ranked, megabytes = done.stdout.split()
    assert (int(num_confident), int(num_ranked)) == (1_000_000, 200_000)
    print(f"{megabytes} MB at the highest")
    assert float(megabytes) <= 400
