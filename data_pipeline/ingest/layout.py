"""The samples of a conversion: in which split each lies, its label, and a key that no other has."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import NamedTuple

from data_pipeline.datasets.layout import Layout


class Split(NamedTuple):
    """The images of one split."""

    numbers: list[int]  # in the source
    keys: list[str]
    labels: list[int | None]  # all None where the split has no class folders


def arrange(layout: Layout) -> dict[str, Split]:
    """The images of each split, by its name. Keys are unique over all splits."""
    number_of: dict[str | None, int | None] = {folder: number for number, folder in enumerate(layout.classes)}
    number_of[None] = None
    keys = unique_keys([place.inner for place in layout.places])
    splits: dict[str, Split] = {}
    for i, (place, key) in enumerate(zip(layout.places, keys, strict=True)):
        split = splits.setdefault(place.split, Split([], [], []))
        split.numbers.append(i)
        split.keys.append(key)
        split.labels.append(number_of[place.folder])
    return splits


def unique_keys(names: Sequence[str]) -> list[str]:
    """A sample's key for each name, none twice."""
    keys = UniqueKeys()
    return [keys.of(name) for name in names]


class UniqueKeys:
    """Gives samples their keys and never one twice; all of them are held in memory."""

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def of(self, name: str) -> str:
        """The file's name without its extension, as webdataset reads it back.

        To webdataset an extension begins at the first dot and names in double underscores are its own.
        """
        folder, slash, base = name.rpartition("/")
        stem = folder + slash + PurePosixPath(base).stem.replace(".", "_")
        stem = re.sub(r"[\x00-\x1f\x7f-\x9f\\\u2028\u2029]", "_", stem)
        stem = f"-{stem}" if stem.startswith("__") else stem
        key, count = stem, 1
        while key in self._seen:
            count += 1
            key = f"{stem}~{count}"
        self._seen.add(key)
        return key
