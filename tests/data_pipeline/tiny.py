"""Small data sets on disk for the tests of order, reading and loading."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image

from data_pipeline.read import ShardDataset, open_dataset
from data_pipeline.scan import index_shards


def photo(number: int, *, side: int = 12) -> bytes:
    """A JPEG unlike that of any other number."""
    pixels = np.random.default_rng(number).integers(0, 256, (side, side + 2, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=80)
    return file.getvalue()


def write_shards(
    folder: Path,
    sizes: Sequence[int],
    *,
    num_classes: int | None = 3,
    replaced: Mapping[int, Mapping[str, bytes]] | None = None,
) -> ShardDataset:
    """Shards of these sizes, keys 0000, 0001, ... through all of them, indexed and opened.

    Args:
        num_classes: labels go round through 0..num_classes-1; None: no labels.
        replaced: by sample number, fields to put in place of its own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    number = 0
    for shard, size in enumerate(sizes):
        with webdataset.TarWriter(str(folder / f"part-{shard:03d}.tar")) as writer:
            for _ in range(size):
                fields: dict[str, bytes] = {"jpg": photo(number)}
                if num_classes is not None:
                    fields["cls"] = str(number % num_classes).encode()
                if replaced and number in replaced:
                    fields = dict(replaced[number])
                writer.write({"__key__": f"{number:04d}", **fields})
                number += 1
    index_shards(str(folder))
    dataset = open_dataset(str(folder))
    assert isinstance(dataset, ShardDataset)
    return dataset
