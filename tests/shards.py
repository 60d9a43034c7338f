"""Small data sets of real tars for tests: JPEGs that differ, written by webdataset and indexed by us."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image

from data_pipeline.shards.scan import index_shards


def jpeg(i: int, size: int, num_classes: int) -> bytes:
    """Noise over a colour of class i % num_classes, so that there is something to learn."""
    rng = np.random.default_rng(i)
    k = i % num_classes
    pixels = np.array([60 + 60 * k, 120, 200 - 50 * k]) + rng.normal(0, 40, (size, size, 3))
    data = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(data, "JPEG", quality=95)
    return data.getvalue()


def write_images(folder: Path, num_samples: int, *, size: int = 20, num_classes: int = 3) -> None:
    """An image folder of class folders."""
    for i in range(num_samples):
        path = folder / f"class{i % num_classes}" / f"{i:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(i, size, num_classes))


def write_shards(
    folder: Path,
    num_samples: int = 100,
    *,
    size: int = 20,
    num_classes: int = 3,
    per_shard: int = 30,
    label: bool = True,
) -> Path:
    """Tars of such images; returns `folder`."""
    folder.mkdir(parents=True)
    with webdataset.ShardWriter(str(folder / "shard-%06d.tar"), maxcount=per_shard, verbose=0) as writer:
        for i in range(num_samples):
            sample = {"__key__": f"{i:06d}", "jpg": jpeg(i, size, num_classes)}
            writer.write(sample | ({"cls": str(i % num_classes).encode()} if label else {}))
    index_shards(str(folder), classes=[f"class{k}" for k in range(num_classes)] if label else None)
    return folder
