"""The first batch at 99 % of an epoch of 10^9 samples in 10^5 shards, against that at its start: a new loader each."""

from __future__ import annotations

import statistics
from contextlib import closing
from time import perf_counter

from data_pipeline.batch import BatchSpec
from data_pipeline.loader import TrainLoader
from data_pipeline.samples.config import Views
from tests.data_pipeline.huge import NUM_SAMPLES, HugeDataset

BATCH, PAIRS = 256, 15


def seconds(dataset: HugeDataset, cursor: int) -> float:
    start = perf_counter()
    loader = TrainLoader(
        dataset, BatchSpec(32), Views(), seed=0, read_streams=16, shuffle_window=1024,
        global_size=BATCH, micro_size=BATCH, max_pixels=10**6,
    )  # fmt: skip
    with closing(loader.steps(cursor)) as steps:  # type: ignore[type-var]
        next(steps)
    return perf_counter() - start


def run() -> list[list[str]]:
    """Medians over pairs, the two sides of which are measured one after the other."""
    dataset = HugeDataset()
    seconds(dataset, 0)  # the first one starts codecs
    pairs = [(seconds(dataset, 0), seconds(dataset, NUM_SAMPLES * 99 // 100)) for _ in range(PAIRS)]
    start, end = (statistics.median(side) * 1e3 for side in zip(*pairs, strict=True))
    low, middle, high = statistics.quantiles((late / early for early, late in pairs), n=4)
    return [
        [
            "first batch at 99 % of 10^9 samples against 0 %",
            f"{end:.0f} / {start:.0f} ms",
            f"{middle:.2f} ({low:.2f} to {high:.2f}, quartiles)",
            "<= 1.2",
        ]
    ]
