"""What of a data set lies behind URLs and is fetched ahead of the steps that read it."""

from __future__ import annotations

from data_pipeline.datasets.dataset import Dataset, singles
from data_pipeline.datasets.read import ShardDataset
from data_pipeline.remote.fetch import Remote
from data_pipeline.remote.prefetch import RemotePart


def remote_parts(dataset: Dataset) -> tuple[RemotePart, ...]:
    """The shards of a data set, or of the parts of a mixture, that have to be fetched."""
    parts, first = [], 0
    for single in singles(dataset):
        shards, indices = single.beneath()
        if isinstance(shards, ShardDataset) and isinstance(shards.manifest.root, Remote):
            parts.append(RemotePart(shards, indices, single.num_samples, first, shards.manifest.root.cache_config))
        first += single.num_samples
    return tuple(parts)
