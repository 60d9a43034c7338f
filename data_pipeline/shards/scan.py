"""A tar, read from front to back into its index: the samples that webdataset's reader finds, or an error.

webdataset's reader ends silently at a damaged header or a missing end; here both are told with their offset.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import re
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data_pipeline.errors import DataError, ManifestError, ShardError
from data_pipeline.messages import reason
from data_pipeline.parallel import run_parallel
from data_pipeline.progress import track
from data_pipeline.shards import strict_tar
from data_pipeline.shards.index import LABEL_FIELD, MISSING, NO_LABEL, SUFFIX, Keys, ShardIndex, is_index
from data_pipeline.shards.keys import KeyHashes, first_repeat, hash_keys
from data_pipeline.shards.manifest import FILE_NAME, PLAN_NAME, Manifest, ShardSummary
from data_pipeline.shards.specs import find_tars

MAX_LABEL = 10_000_000  # a larger "label" is some other number; a histogram of it would fill the memory
MAX_MEMBER_BYTES = 1 << 30  # a sample is read into memory with all its members
PICKLE_FIELDS = frozenset({"pyd", "pickle", "pkl", "pth", "pt"})

# webdataset's rules: the extension begins at the first dot of the base name; __names__ are its own.
_SAMPLE_NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$", re.DOTALL)
_META_NAME = re.compile(r"__[^/]*__($|/)")

Member = tuple[int, int, int]  # offset, size, crc32


def scan_shard(path: Path) -> ShardIndex:
    """The index of the tar `path`, all of it read.

    Raises:
        ShardError: missing, damaged, truncated; or members that are refused: links, pickles, names that leave
            the folder, two samples of one key, a `cls` that is no label. Names shard, offset and member.
    """
    if not path.is_file():
        raise ShardError(where=str(path), expected="a tar", found="no such file", fix="Copy or make it again.")
    try:
        file = path.open("rb")
    except OSError as error:
        raise ShardError(where=str(path), expected="a readable tar", found=reason(error)) from error
    with file:
        return scan(file, str(path))


def scan(file: BinaryIO, where: str) -> ShardIndex:
    """The index of an open tar; as `scan_shard`."""
    content = mapped(file)
    keys: list[str] = []
    samples: list[dict[str, Member]] = []
    seen: dict[str, int] = {}  # key -> its number
    for member in strict_tar.members(file, where, error=ShardError):
        parts = _SAMPLE_NAME.match(member.name)
        if parts is None or _META_NAME.match(member.name):
            continue
        key, field = parts[1], parts[2].lower()
        if not keys or key != keys[-1]:
            if key in seen:
                raise _key_again(where, member, also=field in samples[seen[key]])
            seen[key] = len(keys)
            keys.append(key)
            samples.append({})
        if field in samples[-1]:
            raise _refused(where, member, "one member of a name", "a second one")
        if member.size > MAX_MEMBER_BYTES:
            raise _refused(where, member, f"members of at most {MAX_MEMBER_BYTES:,} bytes", f"{member.size:,} bytes")
        if field.rpartition(".")[2] in PICKLE_FIELDS:
            raise _refused(where, member, "members that are data", "a pickle, which is a program")
        data = content[member.offset_data : member.offset_data + member.size]
        samples[-1][field] = (member.offset_data, member.size, zlib.crc32(data))
    return _index(where, content, keys, samples)


def mapped(file: BinaryIO) -> memoryview:
    """The bytes of an open file, read as they are looked at."""
    if os.fstat(file.fileno()).st_size == 0:
        return memoryview(b"")  # which cannot be mapped
    return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def index_shards(spec: str, *, classes: Sequence[str] | None = None, workers: int = 1) -> Manifest:
    """Write an index beside each tar of `spec` (folder, tar, brace pattern) and a manifest into their folder.

    Args:
        classes: names of labels 0..K-1; None: not known.
        workers: processes that scan.

    Raises:
        ShardError: a tar cannot be read whole, or holds what is refused.
        ManifestError: a manifest is there already, or the folder is an unfinished output of ours; a file that is no
            index of ours has the name of one.
    """
    root, names = find_tars(spec)
    for name, found, fix in (
        (FILE_NAME, "one that is there already", "Remove it to index the shards again."),
        (
            PLAN_NAME,
            "an unfinished dataset",
            "Give the command that makes it again; it goes on where it stopped.",
        ),
    ):
        if (root / name).exists():
            where = str(root / FILE_NAME)
            raise ManifestError(where=where, expected="no manifest yet", found=found, fix=fix)
    paths = [root / name for name in names]
    _refuse_foreign_indexes(paths)
    results = run_parallel(_index_with_keys, paths, workers=workers)
    done = dict(track(results, label="indexing shards", total=len(names)))
    repeated = first_repeat([done[path][1] for path in paths]) is not None
    manifest = Manifest.of(
        root, names, [done[path][0] for path in paths], classes, "by shard" if repeated else "unique"
    )
    manifest.save()
    return manifest


def _refuse_foreign_indexes(paths: Sequence[Path]) -> None:
    """DALI's wds2idx writes its own beside the tars, under the same name."""
    for index in (path.with_suffix(SUFFIX) for path in paths):
        if index.exists() and not is_index(index):
            raise ManifestError(
                where=str(index),
                expected="no file of this name, which the index of the shard beside it has, or an earlier one of ours",
                found="a file of another program, such as DALI's wds2idx writes",
                fix="Make a folder with links to the tars (ln -s), and index that; or move the file elsewhere.",
            )


def _index_with_keys(path: Path) -> tuple[ShardSummary, KeyHashes]:
    index = scan_shard(path)
    index.save(path.with_suffix(SUFFIX))
    return ShardSummary.of(index), hash_keys(index.keys)


def index_shard(path: Path) -> ShardSummary:
    """Scan one tar and write its index beside it."""
    return _index_with_keys(path)[0]


def _refused(where: str, member: tarfile.TarInfo, expected: str, found: str) -> DataError:
    return strict_tar.refused(member, where, expected, found, ShardError)


def _key_again(where: str, member: tarfile.TarInfo, *, also: bool) -> ShardError:
    """The error that a key comes back after others.

    Args:
        also: whether the sample has such a member already, so that there are two samples.
    """
    return ShardError(
        where=f"{where}, offset {member.offset}, member {member.name!r}",
        expected="one sample of a key in a tar" if also else "the members of a sample side by side",
        found="its key a second time" if also else "this one behind members of other samples",
        fix="Give one of them another name."
        if also
        else "Write the tar again in the order of names, which loses "
        "nothing: mkdir unpacked && tar -xf OLD.tar -C unpacked && tar -cf NEW.tar --sort=name -C unpacked .",
    )


def _index(where: str, content: memoryview, keys: list[str], samples: list[dict[str, Member]]) -> ShardIndex:
    fields = tuple(sorted({field for sample in samples for field in sample}))
    missing = (MISSING, 0, 0)
    rows = [sample.get(field, missing) for sample in samples for field in fields]
    table = np.array(rows, dtype=np.int64).reshape(len(samples), len(fields), 3)
    labels = [
        _label(where, key, content, sample[LABEL_FIELD]) if LABEL_FIELD in sample else NO_LABEL
        for key, sample in zip(keys, samples, strict=True)
    ]
    return ShardIndex(
        keys=Keys.of(keys),
        fields=fields,
        offsets=np.ascontiguousarray(table[..., 0]),
        sizes=np.ascontiguousarray(table[..., 1]),
        crc32=table[..., 2].astype(np.uint32),
        labels=np.array(labels, dtype=np.int64),
        shard_sha256=hashlib.sha256(content).hexdigest(),
        shard_bytes=len(content),
    )


def _label(where: str, key: str, content: memoryview, member: Member) -> int:
    offset, size, _ = member
    text = content[offset : offset + min(size, 32)].tobytes()
    label = int(text) if re.fullmatch(rb"\s*\d{1,20}\s*", text) else MAX_LABEL
    if label < MAX_LABEL:
        return label
    raise ShardError(
        where=f"{where}, member {f'{key}.{LABEL_FIELD}'!r}",
        expected=f"a label: digits of an integer below {MAX_LABEL:,}",
        found=repr(text),
        fix="Write the shard again with integer labels.",
    )
