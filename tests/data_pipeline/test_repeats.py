"""Repeated augmentation: each sample R times, drawn anew, at any number of ranks and from any position."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.datasets.read import ShardDataset
from data_pipeline.order.order import Order
from data_pipeline.order.repeats import Repeated
from data_pipeline.samples.config import Augmentation, Mixing
from tests.data_pipeline.tiny import loader, rows_of, steps, write_shards


@settings(max_examples=100, deadline=None)
@given(
    samples=st.integers(1, 40),
    repeats=st.integers(1, 5),
    read_streams=st.integers(1, 9),
    cursor=st.integers(0, 300),
    local=st.integers(1, 12),
    world=st.integers(1, 4),
)
def test_a_step_is_its_stretch_of_positions(
    samples: int, repeats: int, read_streams: int, cursor: int, local: int, world: int
) -> None:
    """Beside the definition: p is repeat p % R of position p // R, in an epoch of its own for what is drawn."""
    inner = Order(np.array([samples]), seed=1, read_streams=read_streams, shuffle_window=4)
    order = Repeated(inner, repeats)
    positions = order.step_positions(cursor, local * world)
    assert sorted(positions.tolist()) == list(range(cursor, cursor + local * world))
    ranks = [order.step_positions(cursor, local * world, rank, world).tolist() for rank in range(world)]
    assert [p for rank in ranks for p in rank] == positions.tolist()
    expected = sorted(positions.tolist(), key=lambda p: (p % repeats, p // repeats % read_streams, p))
    assert positions.tolist() == expected
    for p, i, epoch in zip(
        positions.tolist(), order.locate(positions).tolist(), order.epochs(positions).tolist(), strict=True
    ):
        assert i == inner.locate(np.array([p // repeats]))[0]
        assert divmod(epoch, repeats) == (p // repeats // samples, p % repeats)
        assert next(order.stand_ins(p), None) == next(inner.stand_ins(p // repeats), None)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> ShardDataset:
    return write_shards(tmp_path_factory.mktemp("shards"), [9, 12])


def test_every_sample_comes_three_times_and_looks_different_each_time(dataset: ShardDataset) -> None:
    found = [row for step in steps(loader(dataset, repeats=3, global_size=9), 0, 7) for row in rows_of(step)]
    assert Counter(key for key, _ in found) == {f"{i:04d}": 3 for i in range(21)}
    assert len(set(found)) == 63


def test_ranks_and_workers_change_nothing(dataset: ShardDataset) -> None:
    options = {"repeats": 3, "global_size": 8, "augment": (Augmentation(grayscale=0.5),)}
    alone = steps(loader(dataset, **options), 0, 4)
    workers = steps(loader(dataset, **options, num_workers=1), 0, 4)
    ranks = [steps(loader(dataset, **options, rank=rank, world_size=2), 0, 4) for rank in (0, 1)]
    for number, step in enumerate(alone):
        assert rows_of(workers[number]) == rows_of(step)
        assert rows_of(ranks[0][number]) + rows_of(ranks[1][number]) == rows_of(step)


def test_pairs_are_of_unlike_samples(dataset: ShardDataset) -> None:
    for step in steps(loader(dataset, repeats=2, global_size=8, mixing=Mixing(mixup=1.0)), 0, 5):
        keys = step.micro_batches[0].keys
        assert all(keys[i] != keys[i + 1] for i in range(0, 8, 2))


def test_a_bad_sample_is_replaced_in_each_repeat(tmp_path: Path) -> None:
    dataset = write_shards(tmp_path, [8], replaced={3: {"jpg": b"no image", "cls": b"0"}})
    found = [bad for step in steps(loader(dataset, repeats=2, global_size=8), 0, 2) for bad in step.bad]
    assert [bad.key for bad in found] == ["0003", "0003"]
    assert len({bad.position for bad in found}) == 2
