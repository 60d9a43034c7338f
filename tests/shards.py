"""Small data sets of real tars for tests: JPEGs that differ, written by webdataset and indexed by us."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image

from data_pipeline.scan import index_shards


def write_shards(
    folder: Path,
    num_samples: int = 100,
    *,
    size: int = 20,
    num_classes: int = 3,
    per_shard: int = 30,
    label: bool = True,
) -> Path:
    """Noise over a colour of the class, so that there is something to learn; returns `folder`."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(num_samples)
    with webdataset.ShardWriter(str(folder / "shard-%06d.tar"), maxcount=per_shard, verbose=0) as writer:
        for i in range(num_samples):
            colour = np.array([60 + 60 * (i % num_classes), 120, 200 - 50 * (i % num_classes)])
            pixels = np.clip(colour + rng.normal(0, 40, (size, size, 3)), 0, 255).astype(np.uint8)
            data = io.BytesIO()
            Image.fromarray(pixels).save(data, "JPEG", quality=95)
            sample = {"__key__": f"{i:06d}", "jpg": data.getvalue()}
            writer.write(sample | ({"cls": str(i % num_classes).encode()} if label else {}))
    index_shards(str(folder), classes=[f"class{k}" for k in range(num_classes)] if label else None)
    return folder
