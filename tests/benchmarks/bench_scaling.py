"""Two ranks against one, each on a core and a thread of its own, with the same samples per rank and step.

python -m tests.benchmarks.bench_scaling [--rounds 5]
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

import torch
import torch.distributed as dist

from pretrain.runtime.collectives import World
from pretrain.runtime.state import Progress
from tests.benchmarks.bench_step import benched, blank_batch, engine_of
from tests.ranks import run_ranks

GOAL = 1.8
BATCH, STEPS = 128, 4  # samples of a step on each rank; steps of a round
STAGE = 2


def run(rounds: int = 5) -> list[list[str]]:
    """Rows of the table: what, images per second, ratio with its spread over rounds."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        return [["2 ranks against 1", "", "needs two cores", ""]]
    ratios, rates = [], []
    for _ in range(rounds):
        (one,) = run_ranks(_images_per_second, 1, cores)
        two = sum(run_ranks(_images_per_second, 2, cores))
        ratios.append(two / one)
        rates.append(two)
    return [
        [
            f"2 ranks against 1, ZeRO {STAGE}",
            f"{statistics.median(rates):.0f} images/s",
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
            f">= {GOAL}",
        ]
    ]


def _images_per_second(world: World, cores: list[int]) -> float:
    os.sched_setaffinity(0, {cores[world.rank]})
    torch.set_num_threads(1)
    engine = engine_of(benched(), STAGE, BATCH, world)
    batch = blank_batch(engine.objective, BATCH)
    engine.step([batch], Progress(0, 1, 0), 1e-4)
    dist.barrier()
    start = time.perf_counter()
    for step in range(STEPS):
        engine.step([batch], Progress(step, STEPS, 0), 1e-4)
    return BATCH * STEPS / (time.perf_counter() - start)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    for row in run(parser.parse_args().rounds):
        print("  ".join(row))
