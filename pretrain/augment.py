"""Photometry on the device, batched: what comes after the host's geometry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from data_pipeline.batch import Batch


def normalize(batch: Batch, mean: Sequence[float], std: Sequence[float]) -> Batch:
    """Every view from uint8 to fp32 (x / 255 - mean) / std, where it lies.

    Args:
        batch: views [B, 3, H, W] uint8, already on the device.
        mean: per channel, of images scaled to [0, 1].
        std: per channel, likewise, positive.

    Raises:
        ValueError: a view is not uint8, so it was normalised before or never was an image.
    """
    return replace(batch, views=tuple(_normalized(view, mean, std) for view in batch.views))


def _normalized(view: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    if view.dtype != torch.uint8:
        raise ValueError(f"a view to normalise: expected uint8, found {view.dtype}")
    shift = torch.tensor(mean, device=view.device).view(3, 1, 1)
    scale = torch.tensor(std, device=view.device).view(3, 1, 1)
    return view.float().div_(255).sub_(shift).div_(scale)
