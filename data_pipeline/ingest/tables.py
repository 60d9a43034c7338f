"""A CSV, TSV or Parquet table of image files with captions or labels, on its way into shards.

The table is read once, from front to back; its rows wait in a store, so that neither their number nor the length
of their captions matters to the memory, but for the keys, which are held against each other.
"""

from __future__ import annotations

import csv
import os
import re
import stat
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.datasets.folders import MAX_IMAGE_BYTES
from data_pipeline.errors import SampleError, SourceError
from data_pipeline.ingest.image_normalizer import ImageNormalizer
from data_pipeline.ingest.layout import UniqueKeys
from data_pipeline.ingest.table_rows import IMAGE_NAMES, Table
from data_pipeline.messages import reason
from data_pipeline.samples.captions import one_a_line
from data_pipeline.shards.index import CAPTION_FIELD, LABEL_FIELD
from data_pipeline.shards.row_store import RowReader, RowStore, StoredRows
from data_pipeline.shards.scan import MAX_LABEL
from data_pipeline.shards.strict_tar import is_utf8
from data_pipeline.shards.write import Record

CAPTION_NAMES = ("caption", "text", "txt", "title")
LABEL_NAMES = ("label", "class", "cls")

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_WHOLE = re.compile(r"(0|[1-9][0-9]{0,15})(\.0*)?")  # pandas writes 3.0 where a column of integers has gaps
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


@dataclass(frozen=True)
class Columns:
    """Which columns hold what, and where the images are.

    Attributes:
        image, caption, label: names of columns; None: found by the usual names, and left out if there is none.
        root: folder that the paths are relative to; None: that of the table.
        allow_outside: paths may lead out of `root`.
    """

    image: str | None = None
    caption: str | None = None
    label: str | None = None
    root: Path | None = None
    allow_outside: bool = False


def open_table(path: Path, columns: Columns, normalizer: ImageNormalizer, temporary_folder: Path) -> StoredRows:
    """Read the table once: its rows checked one by one, its labels numbered.

    Labels that are all whole numbers stay what they are; other labels are names, numbered in their order. A
    row that lacks something its columns promise becomes a bad sample.

    Args:
        temporary_folder: where a temporary file as large as the table's text may lie.

    Raises:
        SourceError: no table, or a damaged one; a column that is missing; a URL; a path that leaves the root;
            labels that are numbers but not whole, or too large.
    """
    import pyarrow as pa  # only where a table is read

    if not path.is_file():
        raise SourceError(where=str(path), expected="a table", found="nothing there", fix="Correct the path.")
    try:
        table = Table.open(path, columns.image)
        names = _choose(path, table.column_names(), columns)
        store, labels = _read(table, names, columns, temporary_folder)
    except (pa.ArrowException, csv.Error, zlib.error, OSError, EOFError, UnicodeError) as error:
        raise SourceError(where=str(path), expected="a whole table that can be read", found=reason(error)) from error
    numbers, classes = _number(path, labels)
    root = columns.root or path.parent
    producer = TableProducer(store.reader(), str(path), root, normalizer, numbers)
    return StoredRows(store, producer, classes, {"columns": names})


@dataclass(frozen=True)
class TableProducer:
    """Rows of a table -> samples: the image, its caption (`txt`) and its label (`cls`)."""

    rows: RowReader
    table: str
    root: Path
    normalizer: ImageNormalizer
    numbers: dict[str, int]  # of the labels

    def produce(self, items: Sequence[int]) -> Iterator[Record | SampleError]:
        for offset in items:
            row = self.rows.read(offset)
            where = f"{self.table}, {row['row']}"
            if "found" in row:
                yield SampleError(where, row["expected"], row["found"])
                continue
            try:
                extension, data = self.normalizer.member(_image_bytes(self.root, row["path"]), row["path"])
            except SampleError as error:
                yield SampleError(f"{where} ({row['path']})", error.expected, error.found, error.fix)
                continue
            members = {extension: data}
            if "caption" in row:
                members[CAPTION_FIELD] = one_a_line([row["caption"]]).encode()
            if "label" in row:
                members[LABEL_FIELD] = str(self.numbers[row["label"]]).encode()
            yield row["key"], members


def _image_bytes(root: Path, name: str) -> bytes:
    path = root / name
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_IMAGE_BYTES:
            found = f"{status.st_size:,} bytes" if stat.S_ISREG(status.st_mode) else "a folder or device"
            raise SampleError(where=name, expected=f"a file of at most {MAX_IMAGE_BYTES:,} bytes", found=found)
        return path.read_bytes()
    except OSError as error:
        found = error.strerror or str(error)
        raise SampleError(where=name, expected="a readable file", found=found) from error


def _choose(path: Path, found: list[str], columns: Columns) -> dict[str, str]:
    """{"image": its column, ...}; without what there is no column for."""
    chosen = {}
    wanted = (
        ("image", columns.image, IMAGE_NAMES),
        ("caption", columns.caption, CAPTION_NAMES),
        ("label", columns.label, LABEL_NAMES),
    )
    for role, given, usual in wanted:
        known = {name.lower(): name for name in reversed(found)}
        name = given or next((known[name] for name in usual if name in known), None)
        if name is not None and found.count(name) == 1:
            chosen[role] = name
        elif name is not None or role == "image":
            urls = role == "image" and name is None and any(other.lower().startswith("url") for other in found)
            raise SourceError(
                where=f"{path}, {role} column",
                expected=f"one column {name!r}" if name else f"one of {', '.join(usual)}",
                found=f"the columns {', '.join(found)}" if found else "no columns",
                fix=_DOWNLOAD if urls else f"Give --{role}-column NAME.",
            )
    return chosen


_DOWNLOAD = "Images behind URLs are img2dataset's to download; what it writes can be converted, by its folder."


def _read(table: Table, names: dict[str, str], columns: Columns, temporary_folder: Path) -> tuple[RowStore, set[str]]:
    """All rows in a store, and the labels that occur."""
    path = table.path
    root = os.path.abspath(columns.root or path.parent)
    store, keys, labels = RowStore(temporary_folder), UniqueKeys(), set[str]()
    for place, values in table.rows(list(names.values())):
        row: dict[str, Any] = {"row": place}
        if isinstance(values, str):
            store.add(row | {"expected": "as many values as there are columns", "found": values})
            continue
        for role, text in zip(names, values, strict=True):
            if text is None or not text.strip() or "\0" in text or not is_utf8(text):
                found = f"{text[:40]!r}" if text else "nothing"
                row |= {"expected": f"text in UTF-8 in column {names[role]}", "found": found}
                break
            row[role] = text
        else:
            row["path"] = _inside(f"{path}, {place}", root, row.pop("image").strip(), columns.allow_outside)
            row |= {"key": keys.of(row["path"].lstrip("/")), "file": _stamp(root, row["path"])}
            if "label" in row:
                row["label"] = row["label"].strip()
                labels.add(row["label"])
        store.add(row)
    if not store.offsets:
        raise SourceError(where=str(path), expected="a table with rows", found="none")
    return store, labels


def _inside(where: str, root: str, name: str, allow_outside: bool) -> str:
    """The path relative to the root, or whole where it lies outside."""
    if _URL.match(name):
        raise SourceError(where=where, expected="the path of an image", found=repr(name), fix=_DOWNLOAD)
    whole = os.path.normpath(os.path.join(root, name))
    if whole.startswith(root.rstrip("/") + "/"):
        return os.path.relpath(whole, root)
    if not allow_outside:
        raise SourceError(
            where=where,
            expected=f"a path inside {root}",
            found=repr(name),
            fix="Give the images' folder as --root, or --allow-outside if the table is to be trusted.",
        )
    return whole


def _stamp(root: str, name: str) -> list[int]:
    """Size and time of change, so that a conversion does not go on with other images; nothing where there is none."""
    try:
        status = os.stat(os.path.join(root, name))
    except OSError:
        return []
    return [status.st_size, status.st_mtime_ns]


def _number(path: Path, labels: set[str]) -> tuple[dict[str, int], list[str] | None]:
    """The number of each label, and the names by number where they are no numbers themselves."""
    if all(_WHOLE.fullmatch(label) for label in labels):
        numbers = {label: int(label.partition(".")[0]) for label in labels}
        if too_large := [label for label, number in numbers.items() if number >= MAX_LABEL]:
            raise _wrong_label(path, f"whole numbers below {MAX_LABEL:,}", too_large[0])
        return numbers, None
    if all(_NUMBER.fullmatch(label) for label in labels):
        wrong = min(label for label in labels if not _WHOLE.fullmatch(label))
        raise _wrong_label(path, "whole numbers from 0 on, or names", wrong)
    names = sorted(labels)
    return {name: number for number, name in enumerate(names)}, names


def _wrong_label(path: Path, expected: str, found: str) -> SourceError:
    return SourceError(where=f"{path}, label column", expected=expected, found=found)
