"""Whether a sample's key says which sample it is: it does in its tar, and need not do so in all tars together.

img2dataset and others count anew in each tar. Keys decide what is drawn for a sample (crops, masks) and join labels and
outcomes to it, so that equal ones would share all of these.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import ManifestError
from data_pipeline.shards.manifest import Manifest

KeyHashes = NDArray[np.uint64]


def hash_keys(keys: Iterable[str]) -> KeyHashes:
    """64 bits of each key, [n]: a hundred million are held against each other in little memory."""
    digests = b"".join(hashlib.blake2b(key.encode(), digest_size=8).digest() for key in keys)
    return np.frombuffer(digests, np.uint64)


def first_repeat(hashes: Sequence[KeyHashes]) -> tuple[int, int] | None:
    """Numbers of two samples of one key, counted through all shards; None: there are none.

    Args:
        hashes: of the keys of each shard.
    """
    every = np.concatenate([np.empty(0, np.uint64), *hashes])
    order = np.argsort(every, kind="stable")
    repeats = np.flatnonzero(every[order[1:]] == every[order[:-1]])
    return (int(order[repeats[0]]), int(order[repeats[0] + 1])) if len(repeats) else None


def repeated_key(manifest: Manifest, limit: int | None = None) -> str:
    """Says which key two samples of a data set share, by reading its indexes; empty: none, or keys go by shard.

    Args:
        limit: the first samples only; None: all.
    """
    if manifest.keys == "by shard":
        return ""
    hashes: list[KeyHashes] = []
    for i in range(len(manifest.names)):
        if limit is not None and sum(map(len, hashes)) >= limit:
            break
        hashes.append(hash_keys(manifest.index(i).keys))
    if hashes and limit is not None:
        hashes = [np.concatenate(hashes)[:limit]]
    if (found := first_repeat(hashes)) is None:
        return ""
    ends = np.cumsum(manifest.num_samples)
    shards = [int(ends.searchsorted(number, side="right")) for number in found]
    keys = manifest.index(shards[0]).keys
    key = keys[found[0] - int(ends[shards[0]]) + len(keys)]
    return f"the key {key} in {manifest.names[shards[0]]} and again in {manifest.names[shards[1]]}"


def refuse_repeated_keys(manifest: Manifest, limit: int | None = None) -> None:
    """Raises ManifestError where two samples share a key; asks the indexes where the manifest does not say.

    Args:
        limit: the first samples only; None: all.
    """
    if manifest.keys is None and (found := repeated_key(manifest, limit)):
        raise ManifestError(
            where=str(manifest.root),
            expected="a key of its own for each sample, to tell their outcomes apart",
            found=found,
            fix=f"Index the shards again, which makes keys go by shard: remove {manifest.root}/manifest.json and run "
            "`pretrain data index` (with --classes as before). Runs that train on them are then runs on other data.",
        )
