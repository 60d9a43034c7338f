"""How sure a number or a difference is, and what guessing would give: 95 % intervals and chance, in percent."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import numpy as np
from numpy.typing import NDArray

NORMAL_95 = 1.959964  # two-sided 95 % quantile of the standard normal distribution
OVER_SAMPLES = "the test samples (Wilson)"

Bounds = Sequence[float]  # low and high end, percent


def share_intervals(shares: Mapping[str, float], n: int) -> dict[str, Bounds]:
    """The 95 % interval of each share of n samples (Wilson 1927), which holds its level near 0 and 1 too.

    Args:
        shares: percent, by the name of the metric.
        n: samples that each is a share of, at least 1.
    """
    return {name: _wilson(share / 100, n) for name, share in shares.items()}


def draws_interval(values: Sequence[float]) -> Bounds:
    """The 95 % interval of the mean over independent draws (Student's t); it knows nothing of the test samples' own.

    Args:
        values: percent, of two draws or more.
    """
    from scipy.special import stdtrit

    n, mean = len(values), fmean(values)
    half = float(stdtrit(n - 1, 0.975)) * stdev(values) / math.sqrt(n)
    return [max(0.0, mean - half), min(100.0, mean + half)]


def chance_of_classes(metrics: Iterable[str], num_classes: int) -> dict[str, float]:
    """What guessing among K classes gives, each as likely: 100 / K, and five times that where five guesses are had.

    Args:
        metrics: names of shares of right classes; one that begins with `top5` has five guesses.
        num_classes: K.
    """
    return {name: 100 * min(1.0, (5 if name.startswith("top5") else 1) / num_classes) for name in metrics}


def chance_of_recall(num_own: Sequence[int], num_candidates: int, k: int) -> float:
    """What k candidates drawn at random give: the share of queries, percent, with one of their own among them.

    Args:
        num_own: how many candidates are a query's own, for each query.
        num_candidates: C, of all of them.
        k: of recall at k.
    """
    missed = {own: _all_missed(own, num_candidates, k) for own in set(num_own)}
    return 100 * (1 - fmean(missed[own] for own in num_own))


@dataclass(frozen=True)
class Interval:
    """A difference of accuracies and its 95 % interval, in points of percent."""

    difference: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def paired_interval(correct_a: NDArray[np.bool_], correct_b: NDArray[np.bool_]) -> Interval:
    """95 % interval of accuracy(a) - accuracy(b) on the same samples.

    Bonett & Price 2012 (J. Educ. Behav. Stat. 37, 479-488): Wald's interval after adding one sample that only
    a gets right and one that only b does, which holds its level with few samples and few differences.

    Args:
        correct_a: [n], whether a was right on each sample.
        correct_b: [n], the same samples in the same order.

    Raises:
        ValueError: the shapes differ, or there is no sample.
    """
    if correct_a.shape != correct_b.shape or correct_a.ndim != 1 or not len(correct_a):
        raise ValueError(f"expected two equal shapes [n], found {correct_a.shape} and {correct_b.shape}")
    n = len(correct_a)
    only_a, only_b = int((correct_a & ~correct_b).sum()), int((correct_b & ~correct_a).sum())
    a, b = (only_a + 1) / (n + 2), (only_b + 1) / (n + 2)
    half = NORMAL_95 * math.sqrt((a + b - (a - b) ** 2) / (n + 2))
    return Interval(100 * (only_a - only_b) / n, 100 * max(-1.0, a - b - half), 100 * min(1.0, a - b + half))


def _all_missed(own: int, total: int, k: int) -> float:
    return math.comb(total - own, k) / math.comb(total, k) if k <= total else 0.0


def _wilson(share: float, n: int) -> Bounds:
    squared = NORMAL_95**2
    middle = (share + squared / (2 * n)) / (1 + squared / n)
    half = NORMAL_95 / (1 + squared / n) * math.sqrt(share * (1 - share) / n + squared / (4 * n * n))
    return [100 * max(0.0, middle - half), 100 * min(1.0, middle + half)]
