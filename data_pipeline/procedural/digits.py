"""Handwritten digits: the 1,797 real images of 8 x 8 pixels that come with scikit-learn, made larger.

They lie there in the order in which they were collected, so the last fifth, as the test split, shares few
writers with the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits

from data_pipeline.errors import DataError
from data_pipeline.order import keyed
from data_pipeline.procedural.image import encode
from data_pipeline.shards.write import Record

NUM_TRAIN = 1437
_BRIGHTEST = 16


@dataclass(frozen=True)
class Digits:
    """The split's digits in an order that `seed` decides, each `size` pixels square."""

    split: str
    seed: int
    size: int

    @property
    def classes(self) -> list[str]:
        return [str(digit) for digit in range(10)]

    def produce(self, items: Sequence[int]) -> Iterator[Record]:
        images, labels = _digits()
        order = self._order()
        for i in items:
            number = order[i]
            gray = Image.fromarray((images[number] * (255 / _BRIGHTEST)).round().astype(np.uint8))
            large = gray.resize((self.size, self.size), Image.Resampling.BICUBIC).convert("RGB")
            members = {"jpg": encode(np.asarray(large)), "cls": str(labels[number]).encode()}
            yield f"digits/{self.split}/{number:04d}", members

    def check(self, num_samples: int) -> None:
        """Raises DataError where the split has fewer images."""
        if num_samples > len(self._order()):
            raise DataError(
                where="--samples",
                expected=f"at most {len(self._order()):,}, the real digits of the {self.split} split",
                found=f"{num_samples:,}",
            )

    def _order(self) -> NDArray[np.int64]:
        numbers = np.arange(len(_digits()[1]), dtype=np.int64)
        numbers = numbers[:NUM_TRAIN] if self.split == "train" else numbers[NUM_TRAIN:]
        slots = np.arange(len(numbers), dtype=np.int64)
        return numbers[keyed.permute(slots, np.array([len(numbers)]), keyed.key_of(self.seed))]


@lru_cache(maxsize=1)
def _digits() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    data = load_digits()
    return data.images, data.target
