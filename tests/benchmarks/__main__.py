"""`make bench`: every benchmark in one run, ratios only, as one table."""

from __future__ import annotations

import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from tests.benchmarks import (
    bench_checkpoint,
    bench_knn,
    bench_linear,
    bench_loader,
    bench_scale,
    bench_scaling,
    bench_step,
    bench_views,
)


def help_seconds(runs: int = 7) -> list[list[str]]:
    """`pretrain --help` from start to end, against an interpreter that does nothing."""

    def seconds(*command: str) -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, *command], check=True, capture_output=True)
        return time.perf_counter() - start

    helps = sorted(seconds("-m", "launch.cli", "--help") for _ in range(runs))
    bare = statistics.median(seconds("-c", "pass") for _ in range(runs))
    spread = f"{helps[0]:.2f} to {helps[-1]:.2f} s; bare interpreter {bare:.2f} s"
    return [["pretrain --help", f"{statistics.median(helps):.2f} s", spread, "<= 0.5 s"]]


def photographs() -> list[list[str]]:
    """Images per second on one thread: of the loader, and of two augmented views, each against others."""
    default = Path(__file__).resolve().parents[3] / "shared" / "data"
    photos = Path(os.environ.get("PRETRAIN_TEST_DATA", default)) / "photos.tar"
    if not photos.is_file():
        return [["loader, views", "", f"no photographs at {photos}; set PRETRAIN_TEST_DATA", ""]]
    return [
        [
            f"{what} against {row.name}",
            f"{row.ours:.0f} / {row.other:.0f} images/s",
            f"{row.ratio:.2f} ({row.lower:.2f} to {row.upper:.2f}, quartiles)",
            f">= {row.goal}" if row.goal else "",
        ]
        for what, bench in (("loader", bench_loader), ("views", bench_views))
        for row in bench.run(photos)
    ]


def _alone(part: Callable[[], list[list[str]]]) -> list[list[str]]:
    """In a process of its own, with all cores: DeepSpeed keeps the process groups of the first that used it."""
    threads = len(os.sched_getaffinity(0))
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(1, context, initializer=torch.set_num_threads, initargs=(threads,)) as process:
        return process.submit(part).result()


def main() -> None:
    rows = [["what", "median", "ratio (least to greatest)", "goal"]]
    for part in (
        help_seconds,
        bench_step.run,
        bench_checkpoint.run,
        bench_scaling.run,
        bench_scale.run,
        bench_knn.run,
        bench_linear.run,
        photographs,
    ):
        rows += _alone(part)
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    for row in rows:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")
        if row is rows[0]:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")


if __name__ == "__main__":
    main()
