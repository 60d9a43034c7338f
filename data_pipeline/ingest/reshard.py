"""WebDataset shards from elsewhere (img2dataset's among them) on their way into shards of ours.

Every member is kept as it is, whatever its name; the image is looked at, and made smaller if asked. Nothing is
ever unpickled: shards with pickles are refused.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, BinaryIO

from data_pipeline.errors import SampleError, SourceError
from data_pipeline.ingest.image_normalizer import ImageNormalizer
from data_pipeline.ingest.layout import UniqueKeys
from data_pipeline.messages import reason
from data_pipeline.parallel import run_parallel
from data_pipeline.progress import track
from data_pipeline.samples.captions import one_a_line, read_captions
from data_pipeline.shards.index import CAPTION_FIELD, IMAGE_FIELDS, MISSING, ShardIndex
from data_pipeline.shards.load_manifest import load_manifest
from data_pipeline.shards.manifest import FILE_NAME
from data_pipeline.shards.row_store import RowReader, RowStore, StoredRows
from data_pipeline.shards.scan import scan_shard
from data_pipeline.shards.specs import find_tars
from data_pipeline.shards.write import Record

_OPEN_TARS = 64  # per process


def are_shards(path: Path) -> bool:
    """A folder with tars at its top, or a brace pattern. A tar alone is an archive of an image folder.

    Raises:
        SourceError: a folder with tars, and images or folders beside them.
    """
    if not path.is_dir():
        return "{" in str(path) and not path.exists()
    tars = next(path.glob("[!.]*.tar"), None)
    if tars is None:
        return False
    for other in path.iterdir():
        if other.name[0] not in "._" and (other.is_dir() or other.suffix[1:].lower() in IMAGE_FIELDS):
            raise SourceError(
                where=str(path),
                expected="tars to be read as shards, or images",
                found=f"both: {tars.name} and {other.name}",
                fix="Give the tars as a brace pattern, or move them elsewhere to convert the images.",
            )
    return True


def open_shards(
    path: Path, caption: str | None, normalizer: ImageNormalizer, temporary_folder: Path, *, workers: int = 1
) -> StoredRows:
    """Where every member of every sample lies.

    Args:
        path: a folder of tars, or a brace pattern of them. Tars without a manifest are read through.
        caption: `FIELD` or `FIELD:KEY` (of a JSON member), to become the `txt` of each sample; None: `txt`, where
            there is one.
        temporary_folder: where a temporary file of some 200 bytes a sample may lie.
        workers: processes.

    Raises:
        ShardError: a tar is missing or damaged, or holds what is refused (pickles, links).
        ManifestError: the shards have a manifest or indexes of ours that are not theirs.
    """
    root, names = find_tars(str(path))
    store, keys = RowStore(temporary_folder), UniqueKeys()
    indexes, classes = _indexes(path, root, names, workers)
    for name, index in zip(names, indexes, strict=True):
        for row, key in enumerate(index.keys):
            places = zip(
                index.fields,
                index.offsets[row].tolist(),
                index.sizes[row].tolist(),
                index.crc32[row].tolist(),
                strict=True,
            )
            members = [place for place in places if place[1] != MISSING]
            own = keys.of(f"{key.removeprefix('./')}.*")
            store.add({"tar": name, "of": key, "key": own, "members": members})
    return StoredRows(
        store, ShardProducer(store.reader(), root, normalizer, caption), classes, {"caption_field": caption}
    )


def _indexes(path: Path, root: Path, names: list[str], workers: int) -> tuple[Iterator[ShardIndex], list[str] | None]:
    """Returns the indexes of the tars, in their order: from their manifest if they have one, else by reading them."""
    if (root / FILE_NAME).is_file():
        manifest = load_manifest(str(path))
        numbers = {name: i for i, name in enumerate(manifest.names)}
        classes = None if manifest.classes is None else list(manifest.classes)
        return (manifest.index(numbers[name]) for name in names), classes
    return _scanned(root, names, workers), None


def _scanned(root: Path, names: list[str], workers: int) -> Iterator[ShardIndex]:
    early: dict[str, ShardIndex] = {}
    wanted = iter(names)
    following = next(wanted, None)
    results = run_parallel(partial(_scan, root), names, workers=workers)
    for name, index in track(results, label="reading shards", total=len(names)):
        early[name] = index
        while following in early:
            yield early.pop(following)
            following = next(wanted, None)


def _scan(root: Path, name: str) -> ShardIndex:
    return scan_shard(root / name)


class ShardProducer:
    """Samples of other shards -> samples of ours."""

    def __init__(self, rows: RowReader, root: Path, normalizer: ImageNormalizer, caption: str | None) -> None:
        self.rows, self.root, self.normalizer, self.caption = rows, root, normalizer, caption
        self._open = lru_cache(maxsize=_OPEN_TARS)(self._open_tar)

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardProducer, (
            self.rows,
            self.root,
            self.normalizer,
            self.caption,
        )  # another process opens its own files

    def produce(self, items: Sequence[int]) -> Iterator[Record | SampleError]:
        for offset in items:
            row = self.rows.read(offset)
            try:
                members = self._members(row["tar"], row["of"], row["members"])
                yield row["key"], self._taken(f"{row['tar']}: {row['of']}", members)
            except SampleError as error:
                yield error

    def _open_tar(self, name: str) -> BinaryIO:
        return (self.root / name).open("rb", buffering=0)

    def _members(self, tar: str, key: str, places: list[tuple[str, int, int, int]]) -> dict[str, bytes]:
        members = {}
        for field, offset, size, crc32 in places:
            where = f"{self.root / tar}: {key}.{field}"
            try:
                data = os.pread(self._open(tar).fileno(), size, offset)
            except OSError as error:
                raise SampleError(where=where, expected="readable bytes", found=reason(error)) from error
            if zlib.crc32(data) != crc32:
                raise SampleError(where=where, expected="the bytes that the index was made of", found="other bytes")
            members[field] = data
        return members

    def _taken(self, where: str, members: dict[str, bytes]) -> dict[str, bytes]:
        field = next((field for field in IMAGE_FIELDS if field in members), None)
        if field is None:
            found = f"the members {', '.join(members)}"
            raise SampleError(where=where, expected=f"an image ({', '.join(IMAGE_FIELDS)})", found=found)
        extension, data = self.normalizer.member(members.pop(field), f"{where}.{field}")
        if extension in members:
            raise SampleError(where=f"{where}.{field}", expected="one image of a format", found=f"two {extension}")
        members[extension] = data
        if self.caption is not None or CAPTION_FIELD in members:
            members[CAPTION_FIELD] = self._caption(where, members)
        return members

    def _caption(self, where: str, members: dict[str, bytes]) -> bytes:
        field, _, key = (self.caption or CAPTION_FIELD).partition(":")
        found = read_captions(members, where, field, key or None)
        if not key:
            return members.pop(field)
        return one_a_line(found).encode()
