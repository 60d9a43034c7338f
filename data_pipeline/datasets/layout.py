"""What the names in an image folder say: its splits and its classes. The one reading for folders and archives of one.

Folders that all images share are passed over. Of what remains, the first folder is the class; where the top folders are
splits, the first one below them. A layout that can be read in two ways is refused.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from data_pipeline.datasets.file_names import is_hidden
from data_pipeline.errors import SourceError
from data_pipeline.messages import short_list

SPLITS = frozenset(
    {"train", "training", "val", "valid", "validation", "dev", "test", "testing"} | {"extra", "unlabeled", "unlabelled"}
)


class Place(NamedTuple):
    """Where one image lies."""

    inner: str  # its name below the folders that all images share
    split: str  # "" where splits are not looked for
    folder: str | None  # its class; None for all images of a split without class folders


@dataclass(frozen=True)
class Layout:
    """How the images of a folder lie.

    Attributes:
        shared: the leading folders that all images share, such as `set/images/`.
        places: of the images, in the order of their names.
        classes: names of the class folders, sorted; empty where no image lies in one.
        empty: folders beside the class folders that hold no image, sorted.
    """

    shared: str
    places: list[Place]
    classes: list[str]
    empty: list[str]

    def check_classes(self, path: Path, without: Iterable[str], hint: str = "") -> None:
        """Raises SourceError where a class folder has no image: the classes after it would change their numbers.

        Args:
            path: of the image folder.
            without: folders that look like a class but have no image that can be read.
            hint: what else the user may do.
        """
        if without := sorted(without):
            fix = "Remove what is no class and put back what is missing, or give the folder of the images alone"
            raise SourceError(
                where=str(path),
                expected="images in each class folder",
                found=f"none in {short_list(without)}",
                fix=f"{fix}{hint}.",
            )


def read_layout(names: Sequence[str], others: Iterable[str], path: Path, *, split_by_folder: bool = False) -> Layout:
    """How images lie.

    Args:
        names: of the images, sorted (by characters or by folders), at least one; relative, with `/`.
        others: names of the files that are no images, and of folders, which end in `/`.
        path: of the image folder, for messages.
        split_by_folder: the top folders are splits.

    Raises:
        SourceError: some images of a split lie in class folders and some beside them; the folders are splits
            though that was not said, or the reverse.
    """
    shared = _shared_folders(names, split_by_folder)
    inner = [name[len(shared) :] for name in names]
    _check_tops({name.partition("/")[0] for name in inner}, split_by_folder, path / shared)
    places = [_place(name, split_by_folder) for name in inner]
    for split, members in itertools.groupby(places, key=lambda place: place.split):  # names are sorted
        _check_mixed(list(members), path / shared / split)
    classes = sorted({place.folder for place in places if place.folder is not None})
    candidates = {place.folder for place in _beside(others, shared, split_by_folder)} if classes else set()
    empty = sorted(folder for folder in candidates if folder is not None and folder not in classes)
    return Layout(shared, places, classes, empty)


def _place(inner: str, split_by_folder: bool) -> Place:
    split, _, rest = (inner if split_by_folder else f"/{inner}").partition("/")
    folder, slash, _ = rest.partition("/")
    return Place(inner, split, folder if slash else None)


def _beside(others: Iterable[str], shared: str, split_by_folder: bool) -> Iterable[Place]:
    for name in others:
        if name.startswith(shared) and not is_hidden(name):
            place = _place(name[len(shared) :], split_by_folder)
            if not split_by_folder or place.split.lower() in SPLITS:
                yield place


def _check_tops(tops: set[str], split_by_folder: bool, path: Path) -> None:
    splits = sorted(top for top in tops if top.lower() in SPLITS)
    strangers = sorted(tops.difference(splits))
    if split_by_folder and strangers:
        raise SourceError(
            where=str(path),
            expected=f"top folders named as splits are ({', '.join(sorted(SPLITS))})",
            found=repr(strangers[0]),
            fix="Leave --split-by-folder out if the top folders are classes.",
        )
    if not split_by_folder and (len(splits) > 1 or not strangers):
        raise SourceError(
            where=str(path),
            expected="class folders, or images alone",
            found=f"folders named as splits are ({', '.join(splits)})",
            fix="Give one of these folders alone; or convert them with --split-by-folder, each to its own data set.",
        )


def _shared_folders(names: Sequence[str], split_by_folder: bool) -> str:
    """The leading folders that all sorted names share, up to a split's folder if those are looked for."""
    parts = os.path.commonpath([os.path.dirname(names[0]), os.path.dirname(names[-1])]).split("/")
    if split_by_folder:
        parts = list(itertools.takewhile(lambda part: part.lower() not in SPLITS, parts))
    return "".join(f"{part}/" for part in parts if part)


def _check_mixed(places: list[Place], path: Path) -> None:
    alone = [place.inner for place in places if place.folder is None]
    if alone and len(alone) < len(places):
        raise SourceError(
            where=str(path),
            expected="all images in class folders, or none",
            found=f"{len(alone):,} beside the folders, such as {alone[0]!r}",
            fix="Move them.",
        )
