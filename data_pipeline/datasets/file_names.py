"""What a file in an image folder is, by its name: an image, hidden, or another; and how many there are of each kind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import PurePosixPath

from data_pipeline.messages import short_list
from data_pipeline.samples.unread import unread_suffix
from data_pipeline.shards.index import IMAGE_FIELDS

IMAGE_SUFFIXES = frozenset(f".{field}" for field in IMAGE_FIELDS)


def is_image(name: str) -> bool:
    """By its extension, in any case of letters; what is hidden is none. It may be in a format that is not read here."""
    known = PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES or unread_suffix(name)
    return known and not is_hidden(name) and not name.endswith("/")


def is_hidden(name: str) -> bool:
    """What a file manager or a notebook left beside the images: .DS_Store, .ipynb_checkpoints/, __MACOSX/."""
    return any(part.startswith(".") or part == "__MACOSX" for part in PurePosixPath(name).parts)


def count_by_suffix(names: Sequence[str], most: int = 8) -> str:
    """How many files there are of each suffix, the most frequent first: `22 files (20 .txt, 1 .json, 1 hidden)`."""
    kinds = Counter("hidden" if is_hidden(name) else PurePosixPath(name).suffix or "without suffix" for name in names)
    shown = short_list([f"{count:,} {kind}" for kind, count in kinds.most_common()], most)
    return f"{len(names):,} {'file' if len(names) == 1 else 'files'} ({shown})"
