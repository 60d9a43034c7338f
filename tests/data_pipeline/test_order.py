"""The order: every sample once an epoch, the same whoever asks, and a cursor that may stand anywhere."""

from __future__ import annotations

import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_pipeline.errors import DataError
from data_pipeline.order import keyed
from data_pipeline.order.order import Order

many = settings(max_examples=300, deadline=None)

sizes_of_shards = st.lists(st.integers(0, 12), min_size=1, max_size=9).filter(any)


@st.composite
def orders(draw: st.DrawFn) -> Order:
    return Order(
        np.array(draw(sizes_of_shards)),
        seed=draw(st.integers(0, 2**63)),
        read_streams=draw(st.integers(1, 40)),
        shuffle_window=draw(st.integers(1, 20)),
    )


def sequence(order: Order, start: int, stop: int) -> list[int]:
    return order.locate(np.arange(start, stop)).tolist()


def mix(z: int) -> int:
    """SplitMix64's step in Python's integers, to hold the vectorised one against."""
    z = (z + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def key_of(*numbers: int) -> int:
    key = 0
    for number in numbers:
        key = mix(key ^ number)
    return key


def permute(x: int, size: int, key: int) -> int:
    bits = (size - 1).bit_length()
    low_bits, high_bits = bits - bits // 2, bits // 2
    while True:
        low, high, round_key = x % 2**low_bits, x >> low_bits, key
        for _ in range(4):
            round_key = mix(round_key)
            low ^= mix(round_key ^ high) % 2**low_bits
            round_key = mix(round_key)
            high ^= mix(round_key ^ low) % 2**high_bits
        x = high << low_bits | low
        if x < size:
            return x


def rule_by_rule(sizes: list[int], seed: int, read_streams: int, shuffle_window: int, position: int) -> int:
    """Rules 1 to 3 for one position, with whole lists where order.py has arithmetic."""
    samples = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
    epoch, q = divmod(position, sum(sizes))
    shards = [permute(shard, len(sizes), key_of(1, seed, epoch)) for shard in range(len(sizes))]
    slots = np.concatenate([samples[shard] for shard in shards]).tolist()

    shortest, longer = divmod(len(slots), read_streams)
    stretches, start = [], 0
    for lane in range(read_streams):
        stretches.append(slots[start : start + shortest + (lane < longer)])
        start += len(stretches[-1])
    lane, j = q % read_streams, q // read_streams

    number = j // shuffle_window
    in_window = stretches[lane][number * shuffle_window : (number + 1) * shuffle_window]
    key = key_of(2, seed, epoch, lane, number)
    return int(in_window[permute(j - number * shuffle_window, len(in_window), key)])


@many
@given(size=st.integers(1, 5000), key=st.integers(0, 2**64 - 1))
@example(size=1, key=0)
def test_a_permutation_hits_each_number_once(size: int, key: int) -> None:
    image = keyed.permute(np.arange(size), np.array([size]), np.array([key], np.uint64))
    assert np.array_equal(np.sort(image), np.arange(size))


@pytest.mark.parametrize(("x", "size"), [(5, 5), (-1, 5), (0, 0), (9, 1)])
def test_a_number_outside_is_refused_rather_than_walked_for_ever(x: int, size: int) -> None:
    with pytest.raises(ValueError, match="of it alone"):
        keyed.permute(np.array([0, x]), np.array([7, size]), np.array([1], np.uint64))


@many
@given(
    sizes=sizes_of_shards,
    seed=st.integers(0, 2**64 - 1),
    read_streams=st.integers(1, 40),
    shuffle_window=st.integers(1, 20),
    start=st.integers(0, 10**9),
)
def test_the_order_is_the_rules_taken_one_by_one(
    sizes: list[int], seed: int, read_streams: int, shuffle_window: int, start: int
) -> None:
    order = Order(np.array(sizes), seed=seed, read_streams=read_streams, shuffle_window=shuffle_window)
    expected = [rule_by_rule(sizes, seed, read_streams, shuffle_window, p) for p in range(start, start + 10)]
    assert sequence(order, start, start + 10) == expected


@many
@given(order=orders(), epoch=st.integers(0, 10**6))
def test_each_epoch_has_each_sample_once(order: Order, epoch: int) -> None:
    start = epoch * order.num_samples
    assert sorted(sequence(order, start, start + order.num_samples)) == list(range(order.num_samples))


@many
@given(order=orders(), cursor=st.integers(0, 500), world=st.integers(1, 8), local=st.integers(1, 60))
def test_the_ranks_share_a_step_out_in_order_of_lane_and_position(
    order: Order, cursor: int, world: int, local: int
) -> None:
    size = world * local
    pieces = [order.step_positions(cursor, size, rank, world).tolist() for rank in range(world)]
    assert [len(piece) for piece in pieces] == [local] * world
    assert [p for piece in pieces for p in piece] == sorted(
        range(cursor, cursor + size), key=lambda p: (p % order.read_streams, p)
    )


@many
@given(order=orders(), cuts=st.lists(st.integers(1, 50), min_size=1, max_size=8), split=st.integers(0, 8))
def test_a_run_may_stop_anywhere_and_go_on_with_another_batch_size(order: Order, cuts: list[int], split: int) -> None:
    seen, cursor = [], 0
    for number, size in enumerate(cuts):
        if number == split:  # another process, which knows nothing but the cursor
            order = Order(
                order.shard_sizes, seed=order.seed, read_streams=order.read_streams, shuffle_window=order.shuffle_window
            )
        positions = np.sort(order.step_positions(cursor, size))
        seen += order.locate(positions).tolist()
        cursor += size
    assert seen == sequence(order, 0, sum(cuts))


@many
@given(order=orders(), epoch=st.integers(0, 3))
def test_a_lane_stays_in_its_stretch_and_a_sample_in_its_window(order: Order, epoch: int) -> None:
    """With samples counted in slots (one shard): stream by stream, window by window, the slots come in order."""
    order = Order(
        np.array([order.num_samples]),
        seed=order.seed,
        read_streams=order.read_streams,
        shuffle_window=order.shuffle_window,
    )
    slots = np.array(sequence(order, epoch * order.num_samples, (epoch + 1) * order.num_samples))
    read_streams = [slots[lane :: order.read_streams] for lane in range(order.read_streams)]
    windows = [
        lane[start : start + order.shuffle_window]
        for lane in read_streams
        for start in range(0, len(lane), order.shuffle_window)
    ]
    assert np.concatenate([np.sort(window) for window in windows]).tolist() == list(range(order.num_samples))


@many
@given(order=orders(), position=st.integers(0, 300))
def test_a_stand_in_is_looked_for_in_the_window_and_then_further_on(order: Order, position: int) -> None:
    others = list(order.replacements(position))
    first = position - position % order.num_samples
    epoch = range(first, first + order.num_samples)

    def window_of(p: int) -> tuple[int, int]:
        return (p - first) % order.read_streams, (p - first) // order.read_streams // order.shuffle_window

    same = [p for p in epoch if window_of(p) == window_of(position)]
    at = same.index(position)
    assert others[: len(same) - 1] == same[at + 1 :] + same[:at]
    around = [*range(position + 1, epoch.stop), *range(first, position)]
    assert others[len(same) - 1 :] == [p for p in around if p not in same][: 64 - len(same)]


def test_in_a_long_window_no_stand_in_comes_from_elsewhere() -> None:
    order = Order(np.array([1000]), seed=0, read_streams=2, shuffle_window=100)
    assert sorted(order.replacements(205)) == [p for p in range(201, 401, 2) if p != 205]


def test_the_order_of_a_data_set_never_changes() -> None:
    """A run that goes on under a later version must go on in its order: these numbers are a promise."""
    order = Order(np.array([4, 0, 3, 5]), seed=7, read_streams=3, shuffle_window=3)
    first = [1, 7, 4, 0, 9, 11, 2, 8, 5, 3, 10, 6]
    second = [1, 6, 9, 2, 5, 10, 0, 4, 8, 3, 7, 11]
    assert sequence(order, 0, 24) == first + second


def test_epochs_and_seeds_differ() -> None:
    sizes = np.full(20, 10)
    first = Order(sizes, seed=0, read_streams=4, shuffle_window=16)
    second = Order(sizes, seed=1, read_streams=4, shuffle_window=16)
    starts = [sequence(order, epoch * 200, (epoch + 1) * 200) for order in (first, second) for epoch in range(3)]
    for a in range(len(starts)):
        for b in range(a):
            assert np.mean(np.array(starts[a]) == np.array(starts[b])) < 0.1


@pytest.mark.parametrize("size", [2, 3, 5, 16, 17])
def test_a_permutation_sends_each_number_anywhere_equally_often(size: int) -> None:
    keys = keyed.key_of(3, np.arange(4000))
    for x in range(size):
        images = keyed.permute(np.full(4000, x), np.array([size]), keys)
        expected = 4000 / size
        chi_squared = ((np.bincount(images, minlength=size) - expected) ** 2 / expected).sum()
        assert chi_squared < size - 1 + 5 * np.sqrt(2 * size)  # five standard deviations over its mean


def test_all_orders_of_four_occur() -> None:
    keys = keyed.key_of(4, np.arange(6000))
    images = [keyed.permute(np.full(6000, x), np.array([4]), keys).tolist() for x in range(4)]
    counts = Counter(zip(*images, strict=True))
    assert len(counts) == 24
    assert min(counts.values()) > 150  # of 250


def test_a_window_is_shuffled_over_the_whole_of_it() -> None:
    order = Order(np.array([4096]), seed=0, read_streams=1, shuffle_window=1024)
    moved = np.abs(np.array(sequence(order, 0, 4096)) - np.arange(4096))
    assert 1024 / 3 * 0.9 < moved.mean() < 1024 / 3 * 1.1  # two uniform places are a third apart on average


def test_positions_far_out_are_exact() -> None:
    order = Order(np.array([10**9, 3]), seed=0, read_streams=5, shuffle_window=4096)
    far = (10**9 + 3) * 10**8
    assert len(set(sequence(order, far, far + 1000))) == 1000


def test_an_empty_data_set_is_refused() -> None:
    with pytest.raises(DataError, match="at least one sample"):
        Order(np.array([0, 0]), seed=0, read_streams=1, shuffle_window=1)


class SlowTable(dict[int, object]):
    """Another thread gets its turn after whatever is put in."""

    def __setitem__(self, key: int, value: object) -> None:
        super().__setitem__(key, value)
        time.sleep(1e-3)


def test_threads_may_ask_one_order_for_different_epochs() -> None:
    """Fetching ahead asks for epochs that the training has not come to, and only a few layouts are kept."""
    order, fresh = (Order(np.array([3, 4, 5]), seed=1, read_streams=2, shuffle_window=4) for _ in range(2))
    order._layouts = SlowTable()  # type: ignore[assignment]
    expected = [sequence(fresh, 12 * epoch, 12 * epoch + 12) for epoch in range(30)]
    with ThreadPoolExecutor(3) as pool:
        asked = [*range(30), *range(15, 30), *range(15), *range(29, -1, -1)]
        found = list(pool.map(lambda epoch: sequence(order, 12 * epoch, 12 * epoch + 12), asked))
    assert found == [expected[epoch] for epoch in asked]
