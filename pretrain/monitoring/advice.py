"""Words for the log about what goes wrong without being an error; each said when it lasts, and not at every step."""

from __future__ import annotations

from collections.abc import Callable, Mapping

Advise = Callable[[Mapping[str, float]], str | None]  # values of a logged step -> a sentence, or nothing to say

_COLLAPSED = 0.1  # share of the standard deviation of evenly spread embeddings


class Lasting:
    """Says it once it has held for some logged steps on end, and not again for many more."""

    def __init__(self, advise: Advise, *, lasting: int = 3, again: int = 200) -> None:
        self._advise, self._lasting, self._again = advise, lasting, again
        self._held, self._silent = 0, 0

    def __call__(self, values: Mapping[str, float]) -> str | None:
        advice = self._advise(values)
        self._held = self._held + 1 if advice else 0
        self._silent = max(0, self._silent - 1)
        if self._held < self._lasting or self._silent:
            return None
        self._silent = self._again
        return advice


def collapse(values: Mapping[str, float]) -> str | None:
    """A sentence where `embedding_std` says that all images get nearly the same embedding; else None."""
    found = [value for name, value in values.items() if name.rpartition("/")[2] == "embedding_std"]  # or of a term
    std = min(found, default=1.0)
    if std >= _COLLAPSED:
        return None
    return (
        f"the embeddings collapse: embedding_std is {std:.3f} (1 = spread evenly, 0 = the same for every image), and "
        "the encoder learns nothing from a loss that is this low; lower optim.base_lr, lengthen schedule.warmup or "
        "enlarge batch.global_size, and begin anew"
    )
