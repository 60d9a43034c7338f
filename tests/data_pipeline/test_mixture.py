"""Mixtures: shares to the slot, each source's own order without a gap, and nothing else decides."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.datasets.config import Source
from data_pipeline.datasets.dataset import Part
from data_pipeline.datasets.mixture import Mixture, overlap_notes
from data_pipeline.datasets.read import ShardDataset
from data_pipeline.datasets.training import open_training
from data_pipeline.errors import DataError, FieldError
from data_pipeline.order import keyed
from data_pipeline.order.mixture import PERIOD, MixedOrder, slots_of_pattern
from data_pipeline.order.order import Order
from data_pipeline.samples.config import Views
from data_pipeline.samples.decode import decode_image
from data_pipeline.samples.views import training_view
from tests.data_pipeline.tiny import SPEC, loader, rows_of, steps, write_shards

some = settings(max_examples=30, deadline=None)

weights = st.lists(st.floats(0.01, 100), min_size=1, max_size=5)


def mixed(
    weights: list[float], seed: int, *, read_streams: int = 3, shuffle_window: int = 4, sizes: int = 7
) -> MixedOrder:
    """Source number n has `sizes + n` samples in shards of unequal size."""
    orders = [
        Order(np.array([2, sizes - 2 + n]), seed=seed, read_streams=read_streams, shuffle_window=shuffle_window)
        for n in range(len(weights))
    ]
    return MixedOrder(orders, slots_of_pattern(weights, [str(n) for n in range(len(weights))]), seed=seed)


@some
@given(weights=weights)
def test_slots_are_the_weights_to_within_one_of_the_period(weights: list[float]) -> None:
    slots = slots_of_pattern(weights, [""] * len(weights))
    assert slots.sum() == PERIOD
    assert (np.abs(slots - np.array(weights) / sum(weights) * PERIOD) < 1 + 1e-6).all()


def test_shares_that_fit_are_exact_whatever_the_scale_of_the_weights() -> None:
    assert slots_of_pattern([3, 1], ["a", "b"]).tolist() == [PERIOD * 3 // 4, PERIOD // 4]
    assert slots_of_pattern([3e300, 1e300], ["a", "b"]).tolist() == [PERIOD * 3 // 4, PERIOD // 4]


def test_a_weight_without_a_slot_is_refused() -> None:
    with pytest.raises(DataError, match=r"weight of tiny: .* found 1e-06.*leave the data set out"):
        slots_of_pattern([1, 1e-6, 1], ["a", "tiny", "b"])


@some
@given(weights=weights, seed=st.integers(0, 2**63), start=st.integers(0, 10**12))
def test_any_stretch_of_a_period_has_every_source_in_its_exact_share(
    weights: list[float], seed: int, start: int
) -> None:
    order = mixed(weights, seed)
    source, inner = order.split(np.arange(start, start + PERIOD))
    assert np.bincount(source, minlength=len(weights)).tolist() == order.slots.tolist()
    for number in range(len(weights)):
        own = inner[source == number]
        assert (np.diff(own) == 1).all()  # without a gap, in order: so none twice either


@settings(max_examples=8, deadline=None)
@given(weights=weights, seed=st.integers(0, 2**63), position=st.integers(0, 3 * PERIOD))
def test_a_position_is_what_counting_from_the_start_finds(weights: list[float], seed: int, position: int) -> None:
    """The rules one by one: the pattern as a list, and the source's positions counted slot by slot."""
    order = mixed(weights, seed)
    ends = np.cumsum(order.slots).tolist()
    spread = keyed.permute(np.arange(PERIOD), np.array([PERIOD]), keyed.key_of(3, seed)).tolist()
    pattern = np.array([next(s for s, end in enumerate(ends) if slot < end) for slot in spread])
    repeats, slot = divmod(position, PERIOD)
    source = int(pattern[slot])
    inner = repeats * int((pattern == source).sum()) + int((pattern[:slot] == source).sum())
    assert [int(column[0]) for column in order.split(np.array([position]))] == [source, inner]
    first = sum(other.num_samples for other in order.orders[:source])
    own = order.orders[source]
    assert order.locate(np.array([position])).tolist() == [first + int(own.locate(np.array([inner]))[0])]
    assert order.epochs(np.array([position])).tolist() == [inner // own.num_samples]


@some
@given(weights=weights, seed=st.integers(0, 2**63), start=st.integers(0, 10**9), length=st.integers(1, 400))
def test_each_source_gives_each_of_its_samples_once_in_each_of_its_epochs(
    weights: list[float], seed: int, start: int, length: int
) -> None:
    order = mixed(weights, seed)
    positions = np.arange(start, start + length)
    source, _ = order.split(positions)
    epochs, indices = order.epochs(positions), order.locate(positions)
    times = Counter(zip(source.tolist(), epochs.tolist(), indices.tolist(), strict=True))
    assert set(times.values()) == {1}
    for number, own in enumerate(order.orders):
        found = sorted(set(epochs[source == number].tolist()))
        for epoch in found[1:-1]:  # those that lie in the stretch as a whole
            assert sum(1 for s, e, _ in times if (s, e) == (number, epoch)) == own.num_samples


@some
@given(
    weights=weights,
    seed=st.integers(0, 2**63),
    cursor=st.integers(0, 10**6),
    world=st.integers(1, 6),
    local=st.integers(1, 40),
    read_streams=st.integers(1, 9),
)
def test_ranks_share_a_step_out_by_lane(
    weights: list[float], seed: int, cursor: int, world: int, local: int, read_streams: int
) -> None:
    order = mixed(weights, seed, read_streams=read_streams)
    pieces = [order.step_positions(cursor, world * local, rank, world).tolist() for rank in range(world)]
    assert [len(piece) for piece in pieces] == [local] * world

    def place(position: int) -> tuple[int, int, int]:
        source, inner = (int(column[0]) for column in order.split(np.array([position])))
        return inner % read_streams, source, inner

    expected = sorted(range(cursor, cursor + world * local), key=place)
    assert [position for piece in pieces for position in piece] == expected


def test_a_rank_reads_its_own_lanes_of_every_source() -> None:
    order = mixed([1, 1], seed=0, read_streams=8, sizes=1000)
    for rank in range(4):
        source, inner = order.split(order.step_positions(0, 4096, rank, 4))
        assert 0.4 < source.mean() < 0.6
        assert len(np.unique(inner % 8)) <= 4  # two of its own, and a few samples of the neighbours' next to them


@some
@given(seed=st.integers(0, 2**63), start=st.integers(0, 10**6), weight=st.floats(0.01, 100))
def test_a_mixture_of_one_has_the_order_of_that_one(seed: int, start: int, weight: float) -> None:
    order = mixed([weight], seed)
    positions = np.arange(start, start + 50)
    assert order.locate(positions).tolist() == order.orders[0].locate(positions).tolist()
    assert order.step_positions(start, 12, 1, 2).tolist() == order.orders[0].step_positions(start, 12, 1, 2).tolist()


def test_a_stand_in_comes_from_the_same_source() -> None:
    order = mixed([2, 1], seed=3)
    for position in range(40):
        source, inner = (int(column[0]) for column in order.split(np.array([position])))
        own = [int(order.orders[source].locate(np.array([p]))[0]) for p in order.orders[source].replacements(inner)]
        assert list(order.stand_ins(position)) == [7 * source + i for i in own]


def test_the_pattern_never_changes() -> None:
    """A run that goes on under a later version must go on in its order: these numbers are a promise."""
    order = mixed([3, 1], seed=7)
    assert order.split(np.arange(16))[0].tolist() == [0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 1, 0, 0, 1, 0, 0]
    assert order.locate(np.arange(16)).tolist() == [3, 6, 0, 10, 2, 5, 1, 4, 12, 3, 7, 5, 0, 9, 4, 6]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[ShardDataset]:
    """Equal keys in both, and other labels."""
    return [write_shards(tmp_path_factory.mktemp("shards"), sizes) for sizes in ([5, 4], [3, 1, 2])]


def mixture(datasets: list[ShardDataset], weights: list[float]) -> Mixture:
    names = "abcdef"
    return Mixture([Part(n, d, w) for n, d, w in zip(names, datasets, weights, strict=False)])


def test_a_mixture_reads_what_its_sources_read(pair: list[ShardDataset]) -> None:
    both = mixture(pair, [3, 1])
    assert both.num_samples == 15
    assert both.shard_sizes.tolist() == [5, 4, 3, 1, 2]
    assert both.label_counts is not None
    assert both.label_counts.tolist() == [5, 5, 5]
    for i in range(15):
        number, inner = (0, i) if i < 9 else (1, i - 9)
        sample, own = both.read(i), pair[number].read(inner)
        assert (sample.key, sample.fields) == (f"{number}:{own.key}", own.fields)
        assert both.origin(i) == (sample.key, f"{'ab'[number]}: {pair[number].origin(inner)[1]}")
    with pytest.raises(IndexError):
        both.read(15)


def test_neither_ranks_nor_workers_nor_a_new_start_change_a_mixed_run(pair: list[ShardDataset]) -> None:
    both = mixture(pair, [2, 1])
    alone = steps(loader(both, global_size=8), 0, 6)
    ranks = [steps(loader(both, global_size=8, rank=rank, world_size=2), 0, 6) for rank in (0, 1)]
    workers = steps(loader(both, global_size=8, num_workers=1), 16, 4)
    for number, step in enumerate(alone):
        assert rows_of(ranks[0][number]) + rows_of(ranks[1][number]) == rows_of(step)
    assert [rows_of(step) for step in workers] == [rows_of(step) for step in alone[2:]]
    order = both.order(seed=5, read_streams=3, shuffle_window=4)
    keys = [f"{'0' if i < 9 else '1'}:{i % 9:04d}" for i in order.locate(order.step_positions(8, 8)).tolist()]
    assert [key for key, _ in rows_of(alone[1])] == keys


def test_what_is_drawn_for_a_sample_depends_on_its_sources_own_epoch(pair: list[ShardDataset]) -> None:
    both = mixture(pair, [1, 4])
    order = both.order(seed=5, read_streams=3, shuffle_window=4)
    positions = order.step_positions(32, 8)
    epochs, indices = order.epochs(positions).tolist(), order.locate(positions).tolist()
    assert len(set(epochs)) > 1
    (step,) = steps(loader(both, global_size=8), 32, 1)
    for row, (epoch, i) in enumerate(zip(epochs, indices, strict=True)):
        sample = both.read(i)
        image = decode_image(sample.fields["jpg"], max_pixels=10**6, where="")
        view = training_view(image, 8, Views(), seed=5, epoch=epoch, key=sample.key, view=0)
        assert torch.equal(step.micro_batches[0].views[0][row], view)


def test_a_list_of_one_is_that_data_set(pair: list[ShardDataset]) -> None:
    path = str(pair[0].manifest.root)
    assert (
        open_training([Source(path=path, weight=2)]).fingerprint
        == pair[0].fingerprint
        == open_training(path).fingerprint
    )
    assert open_training([Source(path=path, weight=1), Source(path=path, weight=1)]).num_samples == 18


def test_the_shares_and_the_data_make_the_fingerprint(pair: list[ShardDataset]) -> None:
    one, other = pair
    found = [mixture([one, other], [3, 1]), mixture([one, other], [3, 2]), mixture([other, one], [3, 1])]
    assert len({m.fingerprint for m in found}) == 3
    assert mixture([one, other], [6, 2]).fingerprint == found[0].fingerprint


def test_what_a_source_lacks_is_told_with_its_name(pair: list[ShardDataset], tmp_path: Path) -> None:
    bare = write_shards(tmp_path / "bare", [3], num_classes=None)
    with pytest.raises(FieldError, match=r"^b, label field `cls`: .*found the fields jpg"):
        loader(mixture([pair[0], bare], [1, 1]))
    loader(mixture([pair[0], bare], [1, 1]), replace(SPEC, num_classes=None))


def test_labels_of_different_classes_are_refused_where_labels_are_needed(pair: list[ShardDataset]) -> None:
    known = [ShardDataset(replace(d.manifest, classes=(first, "x", "y"))) for d, first in zip(pair, "cd", strict=True)]
    both = mixture(known, [1, 1])
    with pytest.raises(FieldError, match=r"labels of a and b: .*found b with d, which a does not have so"):
        loader(both)
    assert (both.classes, both.label_counts) == (None, None)
    loader(both, replace(SPEC, num_classes=None))
    assert mixture([known[0], pair[1]], [1, 1]).classes == ("c", "x", "y")


def test_shards_that_two_sources_have_are_told(pair: list[ShardDataset]) -> None:
    one, other = pair
    again = ShardDataset(one.manifest.select(one.manifest.names[:1]))
    told = "data.train: c shares 1 of its shards with a: they are seen by the weights of both"
    assert overlap_notes(Mixture([Part("a", one, 1), Part("b", other, 1), Part("c", again, 1)])) == [told]
    assert overlap_notes(Mixture([Part("a", one, 1), Part("b", other, 1)])) == overlap_notes(one) == []


def test_an_empty_source_is_refused(pair: list[ShardDataset], tmp_path: Path) -> None:
    empty = write_shards(tmp_path, [0])
    with pytest.raises(DataError, match="b: expected at least one sample"):
        mixture([pair[0], empty], [1, 1]).order(seed=0, read_streams=1, shuffle_window=1)
