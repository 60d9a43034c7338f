"""Samples -> tar shards, their indexes and a manifest: in parallel, atomically, the same bytes every time.

A dataset grows in this order: `plan.json` (what it is made from and how), each shard, its index, at last
the manifest. What is killed on the way has no manifest, so nothing takes it for finished; the same command
keeps the shards that are whole and makes the rest. A folder of another plan is refused before anything in
it changes.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar

from data_pipeline.durable import claimed, durable_file, from_json, has_other_files
from data_pipeline.errors import DataError, ManifestError, SampleError, SourceError
from data_pipeline.parallel import run_parallel
from data_pipeline.progress import track
from data_pipeline.shards.index import SUFFIX, ShardIndex
from data_pipeline.shards.load_manifest import load_manifest
from data_pipeline.shards.manifest import FILE_NAME, PLAN_NAME, Manifest, ShardSummary
from data_pipeline.shards.scan import index_shard

Item = TypeVar("Item")
Item_contra = TypeVar("Item_contra", contravariant=True)
Record = tuple[str, Mapping[str, bytes]]  # key, and members by extension
Plan = Mapping[str, Any]  # JSON: everything that decides the bytes

_SHOWN = 10  # bad samples in a message


class Producer(Protocol[Item_contra]):
    """Makes the samples of one shard, each of a key of its own. Travels to worker processes; a pure function of the
    items.
    """

    def produce(self, items: Sequence[Item_contra]) -> Iterator[Record | SampleError]:
        """One record per item in order, or the reason why there is none."""
        ...


@dataclass(frozen=True)
class Shard:
    """What became of one shard."""

    summary: ShardSummary | None  # None: not written, because of `bad`
    bad: tuple[SampleError, ...]


def check_output(out: Path, plan: Plan) -> None:
    """Raises DataError unless `out` is new, empty, or of the same plan. Changes nothing."""
    strange = out.exists() and (not out.is_dir() or has_other_files(out))  # first: another may write its plan just now
    found = _read_plan(out)
    if found is None:
        if strange:
            raise DataError(
                where=str(out),
                expected="a new or empty folder, or one to go on with",
                found="other files" if out.is_dir() else "a file",
                fix="Give another folder.",
            )
    elif found != json.loads(json.dumps(plan)):
        names = [name for name in {**found, **plan} if found.get(name) != plan.get(name)]
        raise DataError(
            where=str(out),
            expected=f"a dataset made with {', '.join(f'{n} = {plan.get(n)!r}' for n in names)}",
            found=f"one with {', '.join(f'{n} = {found.get(n)!r}' for n in names)}",
            fix="Give another folder, or remove this one.",
        )


def write_dataset(
    out: Path,
    plan: Plan,
    shards: Sequence[Sequence[Item]],
    producer: Producer[Item],
    *,
    classes: Sequence[str] | None,
    skip_bad: bool = False,
    workers: int = 1,
    label: str = "writing shards",
) -> tuple[Manifest, tuple[SampleError, ...]]:
    """Make the dataset `out`, or what is still missing of it.

    Returns its manifest, and the bad samples that were left out this time.

    Args:
        out: its folder.
        plan: written down in it; equal plans must give equal `shards` and records.
        shards: the items of each shard.
        producer: makes their samples.
        classes: names of the labels.
        skip_bad: leave bad samples out; else the first pass ends with all of them in an error, nothing
            finished; where no shard has a sample, nothing stays in the folder.
        workers: processes.

    Raises:
        DataError: `out` holds something else.
        SourceError: samples are bad and not to be skipped, or none is left.
        RunError: a file could not be written, or another process is making this dataset.
    """
    check_output(out, plan)
    if (out / FILE_NAME).exists():
        return load_manifest(str(out)), ()
    names = [f"shard-{i:06d}.tar" for i in range(len(shards))]
    with claimed(out / PLAN_NAME, plan, "this dataset"):
        make = partial(_make_shard, out, producer, skip_bad)
        results = run_parallel(make, _numbered(names, shards), workers=workers)
        made = {task[0]: shard for task, shard in track(results, label=label, total=len(shards))}
        bad = [error for name in names for error in made[name].bad]
        summaries = [summary for name in names if (summary := made[name].summary)]
        if (bad and not skip_bad) or not any(summary.num_samples for summary in summaries):
            if not any(summary.num_samples for summary in summaries):
                _take_back(out, names)
            raise _bad_samples(out, bad)
        manifest = Manifest.of(out, names, summaries, classes, "unique")
        manifest.save()
    return manifest, tuple(bad)


def split_evenly(items: Sequence[Item], shard_size: int) -> list[Sequence[Item]]:
    """Consecutive pieces of at most `shard_size` items, equal in size to within one."""
    num_shards = -(-len(items) // shard_size)
    bounds = [len(items) * i // num_shards for i in range(num_shards + 1)]
    return [items[start:stop] for start, stop in itertools.pairwise(bounds)]


def write_tar(file: BinaryIO, records: Iterable[Record]) -> None:
    """A plain WebDataset tar; headers hold names and sizes only, so that equal records give equal bytes."""
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for key, members in records:
            for field in sorted(members):
                header = tarfile.TarInfo(f"{key}.{field}")
                header.size = len(members[field])
                tar.addfile(header, io.BytesIO(members[field]))


Task = tuple[str, Sequence[Item]]


def _numbered(names: Sequence[str], shards: Sequence[Sequence[Item]]) -> Iterator[Task[Item]]:
    yield from zip(names, shards, strict=True)


def _make_shard(out: Path, producer: Producer[Item], skip_bad: bool, task: Task[Item]) -> Shard:
    """Make one shard and its index, unless they are there already."""
    name, items = task
    path = out / name
    summary = _finished(path)
    if summary is not None and (skip_bad or summary.num_samples == len(items)):
        return Shard(summary, ())
    bad: list[SampleError] = []
    try:
        with durable_file(path) as file:
            write_tar(file, _good(producer.produce(items), bad))
            if bad and not skip_bad:
                raise bad[0]
        return Shard(index_shard(path), tuple(bad))
    except SampleError:
        return Shard(None, tuple(bad))


def _good(produced: Iterable[Record | SampleError], bad: list[SampleError]) -> Iterator[Record]:
    for record in produced:
        if isinstance(record, SampleError):
            bad.append(record)
        else:
            yield record


def _finished(path: Path) -> ShardSummary | None:
    """The summary of a shard that is whole, its hash compared."""
    try:
        index = ShardIndex.load(path.with_suffix(SUFFIX))
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except (ManifestError, FileNotFoundError):
        return None
    return ShardSummary.of(index) if digest == index.shard_sha256 else None


def _take_back(out: Path, names: Sequence[str]) -> None:
    """Removes the plan and the shards without a sample, so that other options may be tried in the same folder.

    The folder is this process's; the plan goes last, as whoever comes next begins with it.
    """
    for name in names:
        for path in (out / name, (out / name).with_suffix(SUFFIX)):
            path.unlink(missing_ok=True)
    (out / PLAN_NAME).unlink()
    with suppress(OSError):  # where there is something else in it
        out.rmdir()


def _read_plan(out: Path) -> dict[str, Any] | None:
    try:
        plan = from_json((out / PLAN_NAME).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise DataError(
            where=str(out / PLAN_NAME), expected="the plan of a dataset", found=f"other text ({error})"
        ) from error
    return plan if isinstance(plan, dict) else {}


def _bad_samples(out: Path, bad: Sequence[SampleError]) -> SourceError:
    shown = "; ".join(f"{error.where}: {error.found}" for error in bad[:_SHOWN])
    more = f"; and {len(bad) - _SHOWN:,} more" if len(bad) > _SHOWN else ""
    hints = dict.fromkeys(error.fix for error in bad if error.fix)
    return SourceError(
        where=str(out),
        expected="images that can be used",
        found=f"{len(bad):,} that cannot: {shown}{more}",
        fix=" ".join(["Repair or remove them, or give --skip-bad to leave them out.", *itertools.islice(hints, 3)]),
    )
