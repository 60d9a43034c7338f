"""A data set of 10^9 samples in 10^5 shards that takes no disk, and its manifest."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np

from data_pipeline.batch import Sample
from data_pipeline.datasets.dataset import Single
from tests.data_pipeline.tiny import photo

NUM_SHARDS, PER_SHARD = 10**5, 10**4
NUM_SAMPLES = NUM_SHARDS * PER_SHARD


class HugeDataset(Single):
    """Every sample is the same photograph; `reads` has the numbers of those asked for, in order."""

    def __init__(self) -> None:
        self.num_samples = NUM_SAMPLES
        self.shard_sizes = np.full(NUM_SHARDS, PER_SHARD, np.int64)
        self.fields: tuple[str, ...] = ("jpg",)
        self.classes = self.label_counts = None
        self.fingerprint = "huge"
        self.reads: list[int] = []
        self._photo = photo(0, side=32)

    def read(self, i: int) -> Sample:
        self.reads.append(i)
        return Sample(str(i), {"jpg": self._photo})

    def origin(self, i: int) -> tuple[str, str]:
        return str(i), f"shard-{i // PER_SHARD:06d}.tar"


def write_manifest(folder: Path) -> None:
    """`manifest.json` of such shards, without them."""
    file = {
        "format": "pretrain shards 1",
        "fields": ["cls", "jpg"],
        "classes": None,
        "label_counts": [NUM_SAMPLES],
        "names": [f"shard-{i:06d}.tar" for i in range(NUM_SHARDS)],
        "num_samples": [PER_SHARD] * NUM_SHARDS,
        "num_bytes": [10**9] * NUM_SHARDS,
        "sha256": [hashlib.sha256(str(i).encode()).hexdigest() for i in range(NUM_SHARDS)],
    }
    (folder / "manifest.json").write_text(json.dumps(file))
