"""A batch of nothing, for whoever runs an objective to see what it costs or computes."""

from __future__ import annotations

import torch

from data_pipeline.batch import Batch, BatchSpec


def blank_batch(spec: BatchSpec, size: int) -> Batch:
    """Makes a batch as a spec asks for it, all zeros; the first patches are the hidden ones."""
    masks, tokens = None, None
    if spec.tokens is not None:
        tokens = torch.zeros(size, spec.tokens.context_length, dtype=torch.int64)
    if spec.mask is not None:
        masks = (torch.arange(spec.mask.num_patches) < spec.mask.num_hidden).expand(size, -1)
    return Batch(
        keys=tuple(map(str, range(size))),
        views=tuple(torch.zeros(size, 3, spec.image_size, spec.image_size) for _ in range(spec.num_views)),
        labels=torch.zeros(size, dtype=torch.int64) if spec.num_classes is not None else None,
        tokens=tokens,
        masks=masks,
    )
