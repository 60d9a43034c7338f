"""The data set that a folder, a pattern of tars or a URL names, and whether its files are there."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from data_pipeline.errors import ManifestError, ShardError
from data_pipeline.remote.config import DEFAULT, CacheConfig
from data_pipeline.remote.fetch import Remote, remote_url
from data_pipeline.shards.manifest import FILE_NAME, PLAN_NAME, Manifest
from data_pipeline.shards.specs import find_tars, local_path, split_url

_MAX_BYTES = 2**28  # of a fetched manifest: one of a million shards


def load_manifest(spec: str, *, check_files: bool = True, cache: CacheConfig = DEFAULT) -> Manifest:
    """The dataset that `spec` names.

    Args:
        spec: a folder with a `manifest.json`, that file, or a tar or brace pattern of tars
            (`data/shard-{000000..000009}.tar`) in such a folder: then those shards only. Or such a thing behind
            http://, https:// or s3://.
        check_files: see that every local shard is there at its right size, and its index.
        cache: how what lies behind a URL is fetched and kept.

    Raises:
        DataError: `spec` is another kind of URL, or has a password in it.
        ManifestError: no manifest, or a damaged one, or a shard's index is missing.
        ShardError: a shard is missing or has another size.
    """
    if url := remote_url(spec):
        return _fetch_manifest(url, cache)
    path = local_path(spec)
    if path.is_dir():
        manifest = Manifest.read(_existing(path / FILE_NAME))
    elif path.name.endswith(".json"):
        manifest = Manifest.read(_existing(path))
    else:
        root, names = find_tars(spec)
        manifest = Manifest.read(_existing(root / FILE_NAME)).select(names)
    for i in range(len(manifest.names) if check_files else 0):
        _check_files(manifest, i)
    return manifest


def _fetch_manifest(url: str, cache: CacheConfig) -> Manifest:
    folder, names = split_url(url)
    root = Remote(folder, cache)
    with tempfile.TemporaryDirectory() as place:
        part = Path(place, FILE_NAME)
        manifest = root.fetch(FILE_NAME, part, max_bytes=_MAX_BYTES, check=Manifest.read, error=ManifestError)
    manifest = replace(manifest, root=root)
    return manifest if names is None else manifest.select(names)


def _existing(path: Path) -> Path:
    if path.is_file():
        return path
    if (path.parent / PLAN_NAME).is_file():
        found, fix = (
            "an unfinished dataset",
            "Give the command that makes it again; it goes on where it stopped.",
        )
    elif path.parent.is_dir():
        found = f"no {path.name} there"
        fix = f"If tars lie there, index them: pretrain data index {path.parent}"
    else:
        found, fix = "no such folder", "Correct the path."
    raise ManifestError(where=str(path.parent), expected="a dataset: shards and their manifest", found=found, fix=fix)


def _check_files(manifest: Manifest, i: int) -> None:
    path = manifest.path(i)
    size = path.stat().st_size if path.is_file() else None
    if size != manifest.num_bytes[i]:
        raise ShardError(
            where=str(path),
            expected=f"a shard of {manifest.num_bytes[i]:,} bytes, as the manifest says",
            found="no such file" if size is None else f"{size:,} bytes",
            fix="Copy the shard again.",
        )
    if not manifest.index_path(i).is_file():
        raise ManifestError(
            where=str(manifest.index_path(i)),
            expected="the index of a shard beside it",
            found="no such file",
            fix="Copy it again, or remove manifest.json and run `pretrain data index` on the shards.",
        )
