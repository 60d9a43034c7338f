"""Small data sets on disk, and short runs over them, for the tests of reading and loading."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from PIL import Image

from data_pipeline.batch import Batch, BatchSpec, MaskSpec
from data_pipeline.datasets.dataset import Dataset
from data_pipeline.datasets.read import ShardDataset, open_dataset
from data_pipeline.loader import StepData, TrainLoader
from data_pipeline.samples.config import Views
from data_pipeline.samples.preprocessing import Preprocessing
from data_pipeline.shards.scan import index_shards

SPEC = BatchSpec(8, num_views=2, num_classes=3, mask=MaskSpec(9, 6))

Row = tuple[str, str]  # key, hash of all else that the sample's row of a batch holds


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


def evaluated(size: int, **geometry: Any) -> Preprocessing:
    """Evaluation views of this size, bicubic and of the whole image unless said otherwise; pixels stay as they are."""
    return Preprocessing(size, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), **geometry)


def loader(dataset: Dataset, spec: BatchSpec = SPEC, **options: Any) -> TrainLoader:
    """One with streams, windows and steps so short that all of them end within a few samples."""
    defaults = {"seed": 5, "read_streams": 3, "shuffle_window": 4, "global_size": 4, "max_pixels": 10**6}
    defaults["micro_size"] = options.get("global_size", 4) // options.get("world_size", 1)
    return TrainLoader(dataset, spec, Views(), **(defaults | options))


def steps(source: TrainLoader, cursor: int, count: int) -> list[StepData]:
    """So many steps from a cursor on."""
    with closing(source.steps(cursor)) as stream:  # type: ignore[type-var]
        return list(islice(stream, count))


def rows(batches: list[Batch]) -> list[Row]:
    """What each sample of the batches looks like, in order."""
    found = []
    for batch in batches:
        for row, key in enumerate(batch.keys):
            digest = hashlib.sha256()
            for tensor in (*batch.views, batch.labels, batch.masks, batch.tokens):
                digest.update(b"" if tensor is None else tensor[row].numpy().tobytes())
            found.append((key, digest.hexdigest()))
    return found


def rows_of(step: StepData) -> list[Row]:
    return rows(list(step.micro_batches))
