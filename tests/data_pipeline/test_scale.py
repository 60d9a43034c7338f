"""10^9 samples in 10^5 shards: a first batch costs the same anywhere in the epoch, and memory stays small."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.order import keyed
from data_pipeline.order.order import Order
from tests.data_pipeline.huge import NUM_SAMPLES, NUM_SHARDS, PER_SHARD, HugeDataset, write_manifest
from tests.data_pipeline.tiny import SPEC, loader, steps

LANES, WINDOW, BATCH = 16, 1024, 64
START, END = 0, NUM_SAMPLES * 99 // 100


@pytest.fixture
def permuted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many numbers each call permutes: the one thing that an order spends time on."""
    calls: list[int] = []
    permute = keyed.permute

    def counting(x: keyed.NDArray[np.int64], *rest: object) -> keyed.NDArray[np.int64]:
        calls.append(len(x))
        return permute(x, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(keyed, "permute", counting)
    return calls


def first_batch(cursor: int) -> HugeDataset:
    dataset = HugeDataset()
    spec = SPEC.__class__(8)
    (_,) = steps(loader(dataset, spec, read_streams=LANES, shuffle_window=WINDOW, global_size=BATCH), cursor, 1)
    return dataset


def test_a_first_batch_does_as_much_at_the_end_of_the_epoch_as_at_its_start(permuted: list[int]) -> None:
    """The shards once, and the samples of the batch; each of them is read once, from as many shards as streams."""
    for cursor in (START, END):
        permuted.clear()
        dataset = first_batch(cursor)
        assert sorted(permuted) == [BATCH, NUM_SHARDS]
        assert len(dataset.reads) == len(set(dataset.reads)) == BATCH
        assert len({i // PER_SHARD for i in dataset.reads}) == LANES


@pytest.mark.parametrize("cursor", [START, END, END + 12_345])
def test_going_on_reads_within_one_window_of_each_lane(cursor: int) -> None:
    """What the first batch after a resume touches lies, stream by stream, in a stretch of one window of slots."""
    dataset = first_batch(cursor)
    order = Order(dataset.shard_sizes, seed=5, read_streams=LANES, shuffle_window=WINDOW)
    epoch, q = divmod(cursor, NUM_SAMPLES)
    windows = [((q + lane) // LANES) // WINDOW for lane in range(LANES)]
    reachable: set[int] = set()
    for first in {window * WINDOW * LANES for window in windows}:
        positions = epoch * NUM_SAMPLES + np.arange(first, first + WINDOW * LANES)
        reachable |= set(order.locate(positions).tolist())
    assert len(reachable) <= WINDOW * LANES * len(set(windows))
    assert set(dataset.reads) <= reachable


def test_a_manifest_and_an_order_take_less_than_50_mb(tmp_path: Path) -> None:
    """At its highest, above what the imports take, in a process of its own."""
    write_manifest(tmp_path)
    code = r"""if True:
        import ctypes, re, sys
        ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # no transparent huge pages, which count what nobody asked for
        import numpy as np
        from data_pipeline.shards.load_manifest import load_manifest
        from data_pipeline.order.order import Order
        from data_pipeline.datasets.read import ShardDataset

        def highest():  # of this program, unlike getrusage, which begins with what forked it
            return int(re.search(r"VmHWM:\s*(\d+)", open("/proc/self/status").read())[1]) * 1024

        before = highest()
        dataset = ShardDataset(load_manifest(sys.argv[1], check_files=False))
        order = Order(dataset.shard_sizes, seed=0, read_streams=16, shuffle_window=1024)
        for share in (0, 0.99):
            order.locate(order.step_positions(int(dataset.num_samples * share), 4096))
        print(dataset.num_samples, (highest() - before) / 1e6)
    """
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True, timeout=120
    )
    num_samples, megabytes = done.stdout.split()
    assert int(num_samples) == NUM_SAMPLES
    print(f"{megabytes} MB")
    assert 0 < float(megabytes) <= 50
