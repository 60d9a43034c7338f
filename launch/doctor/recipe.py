"""Checks what a run takes against what is there: shards, read streams, memory, /dev/shm."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.datasets.dataset import Dataset, singles
from data_pipeline.datasets.read import ShardDataset
from data_pipeline.datasets.training import open_training
from data_pipeline.errors import PretrainError
from data_pipeline.remote.fetch import remote_url
from data_pipeline.shards.keys import repeated_key
from data_pipeline.shards.load_manifest import load_manifest
from data_pipeline.shards.manifest import Manifest
from data_pipeline.workers import entries_at_once
from launch.doctor import machine
from launch.slurm.finding import Finding, error, from_error, gigabytes, ok, warning
from pretrain.plan import Footprint
from pretrain.preflight import Plan
from pretrain.recipe.recipe import Data
from pretrain.runtime.run_folder import sha256_of

_HASHED_SHARDS, _HASHED_BYTES = 4, 2 * 10**9  # of a data set: as much as a doctor may read
_SHM = Path("/dev/shm")


@dataclass(frozen=True)
class Ranks:
    """The number of ranks, and how many of them are on one machine."""

    total: int
    local: int


@dataclass(frozen=True)
class CheckedRun:
    """The parts of a run that the doctor checks.

    Attributes:
        name: of its recipe.
        data: what it trains on.
        eval_paths: data sets that its evaluations read.
        num_workers: loader processes of a rank.
        keep_last: checkpoints that are kept.
        ranks: how many there are.
        preflight: checks everything as training does before it starts.
        footprint: counts what the run takes; None: not every check of the plan could be made.
    """

    name: str
    data: Data
    eval_paths: tuple[str, ...]
    num_workers: int
    keep_last: int
    ranks: Ranks
    preflight: Callable[[], Plan]
    footprint: Callable[[Plan | None], Footprint]


def reachable(data: Data, eval_paths: Iterable[str] = ()) -> Iterator[Finding]:
    """Fetches manifests behind URLs, if there are any. One attempt each, where training makes several."""
    train = data.train
    paths = [train] if isinstance(train, str) else [source.path for source in train]
    paths += [data.val] if data.val else []
    paths += eval_paths
    once = data.cache.model_copy(update={"retries": 0, "timeout_seconds": 10.0})
    for path in dict.fromkeys(paths):
        try:
            if not remote_url(path):
                continue
            begun = time.monotonic()
            manifest = load_manifest(path, cache=once)
            manifest.index(0)
        except PretrainError as raised:
            yield from_error("remote data", raised)
        else:
            yield ok("remote data", f"{path}: manifest and first index in {time.monotonic() - begun:.1f} s")


def training_data(data: Data, num_workers: int, ranks: Ranks) -> Iterator[Finding]:
    """Checks what is trained on: that all files are there at their sizes, some shards are sound, and there are enough.

    Args:
        num_workers: loader processes of a rank.
    """
    try:
        dataset = open_training(data.train, data.cache)
    except PretrainError as raised:
        yield from_error("data", raised)
        return
    num_shards = len(dataset.shard_sizes)
    yield ok("data", f"{dataset.num_samples:,} samples in {num_shards:,} shards or files")
    yield from hashes(_manifests(dataset))
    yield from _keys(_manifests(dataset))
    yield from _read_streams(data.read_streams, num_workers, num_shards, ranks)


def hashes(manifests: Sequence[Manifest]) -> Iterator[Finding]:
    """Compares a few shards of each local data set, drawn anew each time, with the manifest."""
    for manifest in manifests:
        drawn = random.sample(range(len(manifest.names)), min(_HASHED_SHARDS, len(manifest.names)))
        num_bytes = 0
        for done, i in enumerate(drawn):
            if num_bytes > _HASHED_BYTES:
                drawn = drawn[:done]
                break
            num_bytes += int(manifest.num_bytes[i])
            try:
                manifest.index(i)
                sound = sha256_of(manifest.path(i)) == manifest.sha256[i]
            except OSError as failed:
                yield error("shards", f"{manifest.where(i)} cannot be read: {failed.strerror}", "Mend the storage.")
                break
            except PretrainError as raised:
                yield from_error("shards", raised)
                break
            if not sound:
                fix = f"Copy it again; `pretrain data verify {manifest.root}` looks at all of them."
                yield error("shards", f"{manifest.where(i)} has another hash than in the manifest", fix)
                break
        else:
            yield ok("shards", f"{manifest.root}: {len(drawn)} of {len(manifest.names)} read, as the manifest has them")


def _keys(manifests: Sequence[Manifest]) -> Iterator[Finding]:
    """Finds samples of one key, where a manifest does not say that there are none."""
    for manifest in manifests:
        try:
            found = "" if manifest.keys is not None else repeated_key(manifest)
        except PretrainError:
            continue  # an index is missing or damaged, which others tell
        if found:
            fix = f"For new runs remove {manifest.root}/manifest.json and index the shards again; one at work goes on."
            yield warning("keys", f"{manifest.root}: {found}: they get the same crops and masks", fix)


def _read_streams(streams: int, num_workers: int, num_shards: int, ranks: Ranks) -> Iterator[Finding]:
    readers = ranks.total * max(1, num_workers)
    found = f"{streams} read streams, {num_shards} shards for {ranks.total} ranks x {max(1, num_workers)} readers"
    if streams < ranks.total:
        fix = (
            f"Set data.read_streams={ranks.total} before the first step (it is part of the order), or take fewer ranks."
        )
        yield warning("read streams", f"{found}: ranks read the same streams, each all of its shards", fix)
    elif num_shards < ranks.total:
        fix = "Make smaller ones with `pretrain data convert --shard-size`, where reading turns out to be the brake."
        yield warning("read streams", f"{found}: ranks read the same shards", fix)
    else:
        yield ok("read streams", f"{found}{'' if num_shards >= readers else '; readers of a rank share shards'}")


def fits(name: str, preflight: Callable[[], Plan]) -> tuple[Plan | None, list[Finding]]:
    """Checks that recipe, data, ranks and folder go together, as of `CheckedRun`."""
    try:
        plan = preflight()
    except PretrainError as raised:
        return None, [from_error("recipe", raised)]
    size = plan.resolved
    batch = f"batch {size.global_size} = {size.world_size} x {size.accumulation} x {size.micro_size}"
    notes = [ok("recipe", note) for note in plan.notes]
    return plan, [ok("recipe", f"{name}: {batch}, {size.total_steps:,} steps"), *notes]


@dataclass(frozen=True)
class Free:
    """The memory that is free, in bytes; None: it is not known from here.

    Attributes:
        host: CPU memory, for all ranks of a machine.
        gpu: memory of a GPU.
        on_gpu: whether ranks compute on GPUs.
    """

    host: float | None
    gpu: float | None
    on_gpu: bool


def memory(needs: Footprint, ranks: Ranks, free: Free) -> Iterator[Finding]:
    """Compares the memory that is free with what is planned."""
    states = "weights, gradients, optimizer state; activations come on top"
    if free.on_gpu:
        found = f"{gigabytes(needs.device)} of a rank ({states})"
        yield ok("GPU memory", found) if free.gpu is None else _room("GPU memory", found, needs.device, free.gpu)
    each = needs.host + (0 if free.on_gpu else needs.device)
    what = "what is offloaded, and a checkpoint's copy" if free.on_gpu else f"a checkpoint's copy, {states}"
    if free.host is not None:
        found = f"{gigabytes(each * ranks.local)} of {ranks.local} ranks ({what})"
        yield _room("memory", found, each * ranks.local, free.host)


def _room(what: str, found: str, needed: float, free: float) -> Finding:
    found = f"{found}, {gigabytes(free)} free"
    fix = "Raise engine.zero_stage or the number of ranks, set engine.offload_optimizer, or take more memory."
    if needed > free:
        return error(what, found, fix)
    return warning(what, found, fix) if needed > 0.7 * free else ok(what, found)


def workers(num_workers: int, plan: Plan, ranks: Ranks) -> Iterator[Finding]:
    """Compares /dev/shm and open files with what loader processes hand over through them."""
    size, needs = plan.resolved, plan.needs
    if not num_workers:
        yield from machine.open_files()
        return
    sample = needs.num_views * 3 * needs.image_size**2  # uint8; what else a batch has is small beside it
    needed = ranks.local * entries_at_once(num_workers) * size.local_size * sample
    free = shutil.disk_usage(_SHM).free if _SHM.is_dir() else 0
    found = f"{gigabytes(needed)} for {ranks.local} x {num_workers} workers' batches, {gigabytes(free)} free"
    fix = f"Make it larger (docker run --shm-size, mount -o remount,size=... {_SHM}), or lower runtime.num_workers."
    if needed > free:
        yield error(str(_SHM), found, fix)
    else:
        yield warning(str(_SHM), found, fix) if needed > 0.7 * free else ok(str(_SHM), found)
    tensors = needs.num_views + 12  # of a micro-batch, each a file to torch
    yield from machine.open_files(512 + entries_at_once(num_workers) * size.accumulation * tensors)


def _manifests(dataset: Dataset) -> list[Manifest]:
    """Returns the manifests of the shards that lie on this machine."""
    shards = [single.beneath()[0] for single in singles(dataset)]
    found = [each.manifest for each in shards if isinstance(each, ShardDataset)]
    return [manifest for manifest in found if isinstance(manifest.root, Path)]
