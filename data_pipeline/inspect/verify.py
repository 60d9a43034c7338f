"""Every byte of a dataset looked at: hashes, tar headers, indexes, counts, and each image decoded."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data_pipeline.errors import DataError, ManifestError, SampleError, ShardError
from data_pipeline.parallel import run_parallel
from data_pipeline.progress import track
from data_pipeline.remote.config import DEFAULT, CacheConfig
from data_pipeline.samples.decode import decode_image
from data_pipeline.shards.file_bytes import FileBytes
from data_pipeline.shards.index import IMAGE_FIELDS, LABEL_FIELD, MISSING, ShardIndex
from data_pipeline.shards.keys import repeated_key
from data_pipeline.shards.load_manifest import load_manifest
from data_pipeline.shards.manifest import Manifest, ShardSummary
from data_pipeline.shards.scan import scan


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong."""

    shard: str
    key: str | None  # None: with the shard as a whole
    what: str
    of_source: bool = False  # an image that cannot be used though its shard is as it was made

    def __str__(self) -> str:
        return f"{self.shard}: {self.what}" if self.key is None else f"{self.shard}, {self.key}: {self.what}"


@dataclass(frozen=True)
class Verification:
    """What was looked at, and every fault found, by shard."""

    num_shards: int
    num_samples: int
    num_bytes: int
    faults: tuple[Fault, ...]


def verify(spec: str, *, max_pixels: int = 50_000_000, workers: int = 1, cache: CacheConfig = DEFAULT) -> Verification:
    """Read the whole dataset `spec` (as `load_manifest` takes it) and report what is wrong with it.

    Args:
        max_pixels: an image of more is a fault.
        workers: processes.
        cache: how shards behind a URL are fetched and kept.

    Raises:
        DataError: there is no dataset to look at. Faults of its shards are returned, not raised.
    """
    manifest = load_manifest(spec, check_files=False, cache=cache)
    check = partial(_check_shard, manifest, max_pixels)
    results = run_parallel(check, range(len(manifest.names)), workers=workers)
    checked = dict(track(results, label="verifying shards", total=len(manifest.names)))
    faults = [fault for i in range(len(manifest.names)) for fault in checked[i][1]]
    summaries = [summary for i in range(len(manifest.names)) if (summary := checked[i][0])]
    if not faults and (what := _check_totals(manifest, summaries)):
        faults.append(Fault(str(manifest.root), None, what))
    return Verification(len(manifest.names), manifest.total, int(manifest.num_bytes.sum()), tuple(faults))


def _check_shard(manifest: Manifest, max_pixels: int, i: int) -> tuple[ShardSummary | None, list[Fault]]:
    """The summary of shard i as it is, None if it cannot be read, and its faults."""
    name = manifest.names[i]
    if isinstance(manifest.root, Path) and not manifest.path(i).is_file():
        return None, [Fault(name, None, "is missing")]
    try:
        file = manifest.open(i)
    except ShardError as error:
        return None, [Fault(name, None, str(error))]
    with file:
        try:
            return _check_content(manifest, file, max_pixels, i)
        except ShardError as error:  # it changed meanwhile
            return None, [Fault(name, None, str(error))]


def _check_content(
    manifest: Manifest, file: BinaryIO, max_pixels: int, i: int
) -> tuple[ShardSummary | None, list[Fault]]:
    name, faults = manifest.names[i], []
    summary = None
    content = FileBytes(file, manifest.where(i))
    if content.size != manifest.num_bytes[i]:
        what = f"has {content.size:,} bytes, not the {manifest.num_bytes[i]:,} of the manifest"
        faults.append(Fault(name, None, what))
    elif content.sha256() != manifest.sha256[i]:
        faults.append(Fault(name, None, "has another hash than in the manifest"))
    actual: ShardIndex | None = None
    index: ShardIndex | None = None
    try:
        actual = scan(file, manifest.where(i))
        summary = ShardSummary.of(actual)
    except ShardError as error:
        faults.append(Fault(name, None, str(error)))
    try:
        index = manifest.index(i)
    except ManifestError as error:
        faults.append(Fault(name, None, str(error)))
    if index is not None:
        faults += _check_samples(manifest, name, index, content, max_pixels)
        if actual is not None and not _equal(index, actual):
            faults.append(Fault(name, None, "its index is not the one that its tar has"))
    return summary, faults


def _check_samples(
    manifest: Manifest, shard: str, index: ShardIndex, content: FileBytes, max_pixels: int
) -> Iterator[Fault]:
    """The faults of every sample that is not as its index says, or not as training needs it."""
    wanted = [field for field in manifest.fields if field not in IMAGE_FIELDS]
    num_classes = None if manifest.classes is None else len(manifest.classes)
    for row, key in enumerate(index.keys):
        members: dict[str, bytes] = {}
        for column, field in enumerate(index.fields):
            offset, size = int(index.offsets[row, column]), int(index.sizes[row, column])
            if offset == MISSING:
                continue
            members[field] = content.read(offset, size)
            if zlib.crc32(members[field]) != index.crc32[row, column]:
                yield Fault(shard, key, f".{field} has other bytes than when it was indexed")
        for field in wanted:
            if field not in members:
                yield Fault(shard, key, f"has no .{field}, which other samples have")
        if num_classes is not None and LABEL_FIELD in members and index.labels[row] >= num_classes:
            what = f"its label {index.labels[row]} is not below {num_classes}, the number of classes"
            yield Fault(shard, key, what)
        yield from (Fault(shard, key, what, of_source=True) for what in _check_image(members, max_pixels))


def _check_image(members: dict[str, bytes], max_pixels: int) -> Iterator[str]:
    images = [field for field in IMAGE_FIELDS if field in members]
    if not images:
        yield "has no image"
    for field in images:
        try:
            decode_image(members[field], max_pixels=max_pixels, where=f".{field}")
        except SampleError as error:
            yield str(error)


def _equal(one: ShardIndex, other: ShardIndex) -> bool:
    """Whether two indexes place the same samples at the same bytes."""
    return one.fields == other.fields and all(
        np.array_equal(a, b)
        for a, b in (
            (one.keys.text, other.keys.text),
            (one.keys.ends, other.keys.ends),
            (one.offsets, other.offsets),
            (one.sizes, other.sizes),
            (one.crc32, other.crc32),
            (one.labels, other.labels),
        )
    )


def _check_totals(manifest: Manifest, summaries: list[ShardSummary]) -> str:
    """What the manifest says wrongly of shards that are sound one by one; empty if nothing."""
    try:
        actual = Manifest.of(manifest.root, manifest.names, summaries, manifest.classes, manifest.keys)
    except DataError as error:
        return str(error)
    if len(set(actual.sha256)) < len(actual.sha256):
        twice = next(n for n, h in zip(actual.names, actual.sha256, strict=True) if actual.sha256.count(h) > 1)
        return f"{twice} is there twice, under another name"
    if actual.fields != manifest.fields:
        return f"the manifest has fields {manifest.fields}, the shards {actual.fields}"
    if not np.array_equal(actual.num_samples, manifest.num_samples):
        return "the manifest's counts are not those of the shards"
    if _counts(actual) != _counts(manifest):
        return "the manifest's histogram of labels is not that of the shards"
    if found := repeated_key(manifest):
        return f"{found}: samples of one key get the same crops and masks, and cannot be evaluated; index them again"
    return ""


def _counts(manifest: Manifest) -> list[int]:
    return [] if manifest.label_counts is None else manifest.label_counts.tolist()
