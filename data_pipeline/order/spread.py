"""Samples from all over a data set, to look at some of them."""

from __future__ import annotations

import numpy as np


def spread_over(total: int, count: int) -> list[int]:
    """Ascending numbers of `count` samples out of `total`, or of all: one, drawn at random, out of each equal stretch.

    The same each time. Steps of equal length would meet the same classes again and again where classes take turns.
    """
    count = min(count, total)
    edges = [i * total // count for i in range(count)] + [total]
    draws = np.random.default_rng([total, count]).random(count)
    return [low + int(draw * (high - low)) for low, high, draw in zip(edges, edges[1:], draws.tolist(), strict=False)]
