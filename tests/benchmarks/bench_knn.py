"""kNN (k = 200, fp32) against a bank of ImageNet's size: how much of the machine's own rate of matrix products is left.

    python -m tests.benchmarks.bench_knn [--rounds 5] [--queries 1024] [--bank 1281167]

A round times, one after the other, the search of `pretrain eval knn`, the plain fp32 products of the same tiles, and,
with fewer queries, faiss-cpu's IndexFlatIP. Where others use the cores too, only the ratios within a round say
something. All of them use all cores. scikit-learn holds its distances whole and in fp64, so it is timed apart, on a
smaller bank. What they find is compared.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import TypeVar

import faiss
import numpy as np
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from pretrain.evals.features.neighbors import TILE, search
from pretrain.evals.knn.protocol import predict

BANK, WIDTH, K, TEMPERATURE, CLASSES = 1_281_167, 768, 200, 0.07, 1000
FAISS_QUERIES, SMALL_BANK, SMALL_QUERIES = 256, 50_000, 1000
GOAL = 0.7
T = TypeVar("T")


def unit_vectors(count: int, width: int, seed: int) -> Tensor:
    """[count, width] fp32, in one piece of memory."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.empty(count, width)
    for part in values.split(2**16):
        part.normal_(generator=generator)
        part /= part.norm(dim=1, keepdim=True)
    return values


def seconds(part: Callable[[], T]) -> tuple[float, T]:
    start = perf_counter()
    found = part()
    return perf_counter() - start, found


def products(bank: Tensor, queries: Tensor) -> None:
    """All similarities, tile by tile, each written over the one before."""
    memory = torch.empty(TILE[0] * TILE[1])
    for rows in bank.split(TILE[1]):
        for asked in queries.split(TILE[0]):
            torch.mm(asked, rows.T, out=memory[: len(asked) * len(rows)].view(len(asked), len(rows)))


def same_neighbours(found: Tensor, others: Tensor) -> float:
    """Share of the k nearest rows, in any order, that both found."""
    pairs = zip(found.tolist(), others.tolist(), strict=True)
    return statistics.mean(len({*a} & {*b}) / len(a) for a, b in pairs)


def ratio(ours: Sequence[float], others: Sequence[float]) -> str:
    ratios = sorted(other / our for our, other in zip(ours, others, strict=True))
    return f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"


def run(rounds: int = 5, num_queries: int = 1024, bank_size: int = BANK) -> list[list[str]]:
    """Rows of the table: what, rates, ratio of rates with its least and greatest, goal."""
    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)
    bank, queries = unit_vectors(bank_size, WIDTH, 0), unit_vectors(num_queries, WIDTH, 1)
    few = queries[:FAISS_QUERIES]
    products(bank[: TILE[1]], queries)  # what is made once
    ours, plain, theirs = [], [], []
    for number in range(rounds):
        print(f"kNN, round {number + 1} of {rounds}", file=sys.stderr, flush=True)
        spent, (_, found) = seconds(lambda: search(bank, queries, K))
        ours.append(spent)
        plain.append(seconds(lambda: products(bank, queries))[0])
        # The search of IndexFlatIP, without a copy of the bank in an index.
        spent, (_, others) = seconds(lambda: faiss.knn(few.numpy(), bank.numpy(), K, faiss.METRIC_INNER_PRODUCT))
        theirs.append(spent)
    flops = 2 * bank_size * WIDTH * num_queries
    agreement = same_neighbours(found[: len(few)], torch.from_numpy(others))
    per_query = [s / num_queries for s in ours]
    what = f"kNN, k = {K}, {bank_size:,} x {WIDTH}"
    rates = [statistics.median(flops / s for s in side) / 1e9 for side in (ours, plain)]
    answers = [statistics.median(1 / s for s in per_query), statistics.median(len(few) / s for s in theirs)]
    return [
        [f"{what}, against plain products", "{:.0f} / {:.0f} GFLOP/s".format(*rates), ratio(ours, plain), f">= {GOAL}"],
        [
            f"{what}, against faiss, {agreement:.4%} the same rows",
            "{:.1f} / {:.1f} queries/s".format(*answers),
            ratio(per_query, [s / len(few) for s in theirs]),
            "",
        ],
        _scikit_learn(bank[:SMALL_BANK], queries[:SMALL_QUERIES], rounds),
    ]


def _scikit_learn(bank: Tensor, queries: Tensor, rounds: int) -> list[str]:
    labels = torch.arange(len(bank)) % CLASSES

    def ours() -> Tensor:
        found = predict(bank, labels, queries, ks=(K,), temperatures=(TEMPERATURE,), num_classes=CLASSES)
        return found[K, TEMPERATURE]

    model = KNeighborsClassifier(
        K, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / TEMPERATURE), n_jobs=-1
    )
    model.fit(bank.numpy(), labels.numpy())
    mine, theirs = [], []
    for _ in range(rounds):
        spent, found = seconds(ours)
        mine.append(spent)
        spent, expected = seconds(lambda: model.predict(queries.numpy()))
        theirs.append(spent)
    same = float((expected == found.numpy()).mean())
    rates = [len(queries) / statistics.median(side) for side in (mine, theirs)]
    return [
        f"kNN, {len(bank):,} x {WIDTH}, against scikit-learn, {same:.1%} the same labels",
        "{:.0f} / {:.0f} queries/s".format(*rates),
        ratio(mine, theirs),
        "",
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--queries", type=int, default=1024)
    parser.add_argument("--bank", type=int, default=BANK)
    arguments = parser.parse_args()
    for row in run(arguments.rounds, arguments.queries, arguments.bank):
        print("  ".join(row))
