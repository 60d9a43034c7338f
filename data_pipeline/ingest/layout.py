"""What the names of an image folder say: splits, classes, and a key for each sample."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from data_pipeline.errors import SourceError

SPLITS = frozenset(
    {"train", "training", "val", "valid", "validation", "dev", "test", "testing"} | {"extra", "unlabeled", "unlabelled"}
)


class Split(NamedTuple):
    """The images of one split."""

    numbers: list[int]  # in the source
    keys: list[str]
    labels: list[int | None]  # all None where the split has no class folders


def arrange(names: Sequence[str], split_by_folder: bool, path: Path) -> tuple[dict[str, Split], list[str]]:
    """What the sorted `names` of a source's images say: ({split: its images}, names of the classes).

    Without `split_by_folder` there is one split, called "". Keys are unique over all splits.

    Raises:
        SourceError: some images of a split lie in class folders and some beside them; the folders are splits
            though that was not said, or the reverse.
    """
    start = len(_shared_folders(names, split_by_folder))
    inner = [name[start:] for name in names]
    _check_tops({name.partition("/")[0] for name in inner}, split_by_folder, path)
    members: dict[str, list[tuple[int, str]]] = {}  # split -> (number, name from the class folder on)
    for i, name in enumerate(inner):
        split, _, rest = (name if split_by_folder else f"/{name}").partition("/")
        members.setdefault(split, []).append((i, rest))
    folders = {split: _class_folders(split, inside, path) for split, inside in members.items()}
    classes = sorted({folder for column in folders.values() for folder in column if folder is not None})
    number_of: dict[str | None, int | None] = {folder: number for number, folder in enumerate(classes)}
    number_of[None] = None
    keys = unique_keys(inner)
    splits = {}
    for split, inside in members.items():
        numbers = [i for i, _ in inside]
        labels = [number_of[folder] for folder in folders[split]]
        splits[split] = Split(numbers, [keys[i] for i in numbers], labels)
    return splits, classes


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


def _check_tops(tops: set[str], split_by_folder: bool, path: Path) -> None:
    strangers = sorted(top for top in tops if top.lower() not in SPLITS)
    if split_by_folder and strangers:
        raise SourceError(
            where=str(path),
            expected=f"top folders named as splits are ({', '.join(sorted(SPLITS))})",
            found=repr(strangers[0]),
            fix="Leave --split-by-folder out if the top folders are classes.",
        )
    if not split_by_folder and not strangers:
        raise SourceError(
            where=str(path),
            expected="class folders, or images alone",
            found=f"folders named as splits are ({', '.join(sorted(tops))})",
            fix="Give --split-by-folder.",
        )


def _shared_folders(names: Sequence[str], split_by_folder: bool) -> str:
    """The leading folders that all sorted names share, up to a split's folder if those are looked for."""
    parts = os.path.commonpath([os.path.dirname(names[0]), os.path.dirname(names[-1])]).split("/")
    if split_by_folder:
        parts = list(itertools.takewhile(lambda part: part.lower() not in SPLITS, parts))
    return "".join(f"{part}/" for part in parts if part)


def _class_folders(split: str, members: list[tuple[int, str]], path: Path) -> list[str | None]:
    folders = [name.partition("/")[0] if "/" in name else None for _, name in members]
    alone = [name for (_, name), folder in zip(members, folders, strict=True) if folder is None]
    if alone and len(alone) < len(members):
        raise SourceError(
            where=f"{path}, {split or 'top folder'}",
            expected="all images in class folders, or none",
            found=f"{len(alone):,} beside the folders, such as {alone[0]!r}",
            fix="Move them.",
        )
    return folders
