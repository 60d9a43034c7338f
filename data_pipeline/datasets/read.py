"""A data set to read from by sample number: shards by their byte index, or an image folder as it lies.

Files of this machine, or behind http(s):// or s3://. Another scheme, such as `pipe:` (webdataset runs a shell
for it), and pickles in shards (reading one can run code) are refused; nothing here ever unpickles.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.batch import Sample
from data_pipeline.datasets.dataset import Dataset, Single
from data_pipeline.datasets.file_names import IMAGE_SUFFIXES, is_image
from data_pipeline.datasets.folders import list_folder
from data_pipeline.datasets.layout import read_layout
from data_pipeline.errors import DataError, SampleError, ShardError
from data_pipeline.messages import reason
from data_pipeline.remote.config import DEFAULT, CacheConfig
from data_pipeline.remote.fetch import Remote, remote_url
from data_pipeline.samples.unread import unread, unread_suffix
from data_pipeline.shards.index import IMAGE_FIELDS, LABEL_FIELD, MISSING
from data_pipeline.shards.load_manifest import load_manifest
from data_pipeline.shards.manifest import FILE_NAME, PLAN_NAME, Manifest
from data_pipeline.shards.scan import PICKLE_FIELDS
from data_pipeline.shards.specs import local_path

_OPEN_SHARDS = 128  # per process; a step reads one shard per stream, mostly


class ShardDataset(Single):
    """WebDataset tars, read at the offsets of their index; every member's crc32 is checked each time.

    Open files are shared safely with forked workers: reading moves no file position.
    """

    def __init__(self, manifest: Manifest) -> None:
        pickles = [name for name in manifest.fields if name.rsplit(".", 1)[-1] in PICKLE_FIELDS]
        if pickles:
            raise ShardError(
                where=str(manifest.root),
                expected="shards without pickles, which can run code when they are read",
                found=f"members .{', .'.join(pickles)}",
                fix="Write the shards again without them.",
            )
        self.manifest = manifest
        self.num_samples = manifest.total
        self.shard_sizes = np.asarray(manifest.num_samples, np.int64)
        self.fields = manifest.fields
        self.classes = manifest.classes
        self.label_counts = manifest.label_counts
        self.shard_bytes = np.asarray(manifest.num_bytes, np.int64)
        self.fingerprint = self.state = manifest.fingerprint  # of hashes, so nothing changes unseen
        self._ends = np.cumsum(self.shard_sizes)
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()  # the one used last at the end

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardDataset, (self.manifest,)  # a spawned process opens its own files

    def read(self, i: int) -> Sample:
        shard, row = self._find(i)
        try:
            return self._sample(shard, row)
        except SampleError:
            root = self.manifest.root
            if not isinstance(root, Remote):
                raise
            root.distrust_shard(self.manifest.sha256[shard])  # it is the cached copy that may be damaged
            del self._open[shard]
            return self._sample(shard, row)

    def _sample(self, shard: int, row: int) -> Sample:
        opened = self._opened(shard)
        index = opened.index
        key = index.keys[row]
        members = {}
        places = zip(index.offsets[row].tolist(), index.sizes[row].tolist(), index.crc32[row].tolist(), strict=True)
        for name, (offset, size, crc32) in zip(index.fields, places, strict=True):
            if offset == MISSING:
                continue
            data = opened.read(offset, size)
            if zlib.crc32(data) != crc32:
                raise SampleError(
                    where=f"{opened.where}: {key}.{name}",
                    expected=f"{size} bytes with the crc32 of the index",
                    found="other bytes" if len(data) == size else f"{len(data)} bytes",
                    fix=f"Run `pretrain data verify {self.manifest.root}`.",
                )
            members[name] = data
        return Sample(self.manifest.sample_key(shard, key), members)

    def origin(self, i: int) -> tuple[str, str]:
        shard, row = self._find(i)
        return self.manifest.sample_key(shard, self._opened(shard).index.keys[row]), self.manifest.names[shard]

    def _opened(self, shard: int) -> _OpenShard:
        opened = self._open.get(shard)
        if opened is None:
            self._let_go_with_the_cache()
            while len(self._open) >= _OPEN_SHARDS:
                self._open.popitem(last=False)
            opened = self._open[shard] = _OpenShard(self.manifest, shard)
        self._open.move_to_end(shard)
        return opened

    def _let_go_with_the_cache(self) -> None:
        """Close what the cache has dropped: its bound is one of the disk, which open files take up too."""
        if isinstance(self.manifest.root, Remote):
            for shard in [shard for shard, opened in self._open.items() if opened.is_nameless]:
                del self._open[shard]

    def shards_in(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Number of the shard that each sample lies in, [n]."""
        return self._ends.searchsorted(indices, side="right")

    def fetch(self, shard: int) -> None:
        """Brings a shard from behind a URL, and its index, into the cache."""
        self.manifest.index(shard)
        self.manifest.open(shard).close()

    def _find(self, i: int) -> tuple[int, int]:
        if not 0 <= i < self.num_samples:
            raise IndexError(f"sample {i} of {self.num_samples}")
        shard = int(self._ends.searchsorted(i, side="right"))
        return shard, i - int(self._ends[shard] - self.shard_sizes[shard])


class _OpenShard:
    """A file descriptor and the shard's index; closed when the cache lets go of it."""

    def __init__(self, manifest: Manifest, shard: int) -> None:
        self.where = manifest.where(shard)
        self.index = manifest.index(shard)
        self._file = manifest.open(shard)

    @property
    def is_nameless(self) -> bool:
        """Whether the file was removed, and is kept on the disk by being open alone."""
        return os.fstat(self._file.fileno()).st_nlink == 0

    def read(self, offset: int, size: int) -> bytes:
        try:
            return os.pread(self._file.fileno(), size, offset)
        except OSError as error:
            raise ShardError(
                where=self.where, expected="a readable shard", found=error.strerror or str(error)
            ) from error

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()


class FolderDataset(Single):
    """An image folder: one folder per class, labels in the order of their names; or images without labels.

    What is an image, which folders are classes, which links are followed and what is passed over as hidden is as
    `data convert` has it. A picture in a format that is not read here is a sample that cannot be used. Each file counts
    as a shard of its own, so the order shuffles all of them.

    Raises:
        DataError: no folder, or no image in it; a class folder without one; links in a circle; images beside class
            folders, or folders of splits.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_dir():
            raise DataError(where=str(path), expected="a folder of images", found="no folder")
        try:
            listed = list(list_folder(path))
        except OSError as error:
            raise DataError(where=str(path), expected="a readable folder", found=reason(error)) from error
        found = sorted((Path(e.name), e.size, stamp) for e, stamp in listed if is_image(e.name))
        files = [file for file, _, _ in found]
        readable = [file for file in files if not unread_suffix(file.name)]
        if not readable:
            raise DataError(
                where=str(path),
                expected=f"images ({', '.join(sorted(IMAGE_SUFFIXES))}) or shards with a manifest",
                found="none",
                fix="Give a folder of class folders, or of shards with a manifest (`pretrain data index`).",
            )
        others = [entry.name for entry, _ in listed if not is_image(entry.name)]
        layout = read_layout([file.as_posix() for file in files], others, path)
        folders = [place.folder for place in layout.places]
        with_images = {folder for file, folder in zip(files, folders, strict=True) if not unread_suffix(file.name)}
        layout.check_classes(path, {*layout.classes, *layout.empty} - with_images)
        numbers = {name: number for number, name in enumerate(layout.classes)}
        labeled = bool(layout.classes)
        self._files, self._keys = files, _unique_keys(files)
        self._labels = [-1 if folder is None else numbers[folder] for folder in folders]
        self.num_samples = len(files)
        self.shard_sizes = np.ones(len(files), np.int64)
        images = tuple(name for name in IMAGE_FIELDS if any(_extension(file) == name for file in readable))
        self.fields = (LABEL_FIELD, *images) if labeled else images
        self.classes = tuple(layout.classes) if labeled else None
        self.label_counts = np.bincount(self._labels) if labeled else None
        # To hash every image would be to read the data set before its first use. Sizes miss an image that was replaced
        # by one as large; times of change see it, but differ between copies of the same data.
        self.fingerprint = _digest(f"{file.as_posix()}\0{size}\n" for file, size, _ in found)
        self.state = _digest(f"{file.as_posix()}\0{size}\0{stamp}\n" for file, size, stamp in found)

    def read(self, i: int) -> Sample:
        file = self._files[i]
        where = str(self.path / file)
        try:
            data = (self.path / file).read_bytes()
        except OSError as error:
            raise SampleError(where=where, expected="a readable file", found=reason(error)) from error
        if unread_suffix(file.name) and (problem := unread(data, where)):
            raise problem
        members = {IMAGE_FIELDS[0] if unread_suffix(file.name) else _extension(file): data}
        if self._labels[i] >= 0:
            members[LABEL_FIELD] = str(self._labels[i]).encode()
        return Sample(self._keys[i], members)

    def origin(self, i: int) -> tuple[str, str]:
        return self._keys[i], self._files[i].as_posix()


def _unique_keys(files: Sequence[Path]) -> list[str]:
    """Names without their extension; one that another file has already is numbered, as a conversion does."""
    keys: dict[str, None] = {}
    for file in files:
        stem = key = file.with_suffix("").as_posix()
        count = 1
        while key in keys:
            count += 1
            key = f"{stem}~{count}"
        keys[key] = None
    return list(keys)


def _digest(lines: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode(errors="surrogateescape"))
    return digest.hexdigest()


def _extension(file: Path) -> str:
    return file.suffix[1:].lower()


def open_dataset(spec: str, cache: CacheConfig = DEFAULT) -> Dataset:
    """A folder with a manifest, a `manifest.json`, a brace pattern of tars beside one; or an image folder.

    Args:
        spec: where it is; shards may lie behind http://, https:// or s3://.
        cache: how such shards are fetched and kept.

    Raises:
        DataError: another scheme (`pipe:`), or nothing there that can be read.
        RunError: a manifest that could not be fetched.
    """
    if remote_url(spec):
        return ShardDataset(load_manifest(spec, cache=cache))
    path = local_path(spec)
    of_shards = not path.is_dir() or any((path / name).exists() for name in (FILE_NAME, PLAN_NAME))
    if of_shards or any(path.glob("*.tar")):
        return ShardDataset(load_manifest(spec))
    return FolderDataset(path)
