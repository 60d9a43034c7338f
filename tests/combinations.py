"""Which combination of ZeRO stage, number of ranks and the like a case is tried at: one of them, or every one.

Where cases and combinations make a product, `make test` tries each case once, at a combination drawn from its name, and
`make drills` runs the same check over all of the product.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any


def drawn(cases: Iterable[str], *axes: Sequence[Any]) -> dict[str, tuple[Any, ...]]:
    """One value of each axis for each case, the same in every run.

    Every value is drawn about as often as every other of its axis, so that as many cases as the longest axis has values
    cover all of them; of combinations that are alike in this, one that was not drawn yet is preferred.
    """
    values: Counter[tuple[int, Any]] = Counter()
    combinations: Counter[tuple[Any, ...]] = Counter()
    found = {}
    for case in sorted(cases, key=_digest):

        def rank(combination: tuple[Any, ...], case: str = case) -> tuple[int, int, str]:
            taken = sum(values[pair] for pair in enumerate(combination))
            return taken, combinations[combination], _digest(case, *combination)

        found[case] = min(itertools.product(*axes), key=rank)
        values.update(enumerate(found[case]))
        combinations[found[case]] += 1
    return found


def _digest(*words: object) -> str:
    return hashlib.sha256(repr(words).encode()).hexdigest()
