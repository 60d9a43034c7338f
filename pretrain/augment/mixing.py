"""Mixup and cutmix of neighbors: images 2i and 2i + 1 take from each other, and so do their labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from data_pipeline.batch import Batch
from pretrain.augment.selected import apply_to_selected, as_column, inside


def mix(batch: Batch, drawn: Mapping[str, Tensor], num_classes: int) -> Batch:
    """The batch with its pairs mixed and labels soft; as it is, with plain labels, where nothing was drawn.

    Args:
        batch: normalized views [B, 3, H, W], B even, written to; labels [B] int64, or [B, K] soft.
        drawn: on the host, `mix/lam` [B] and `mix/box` [B, 4] (data_pipeline/samples/draws.py), equal in a pair.
        num_classes: K.

    Returns:
        labels [B, K] fp32, lam * own + (1 - lam) * partner's. Label smoothing is the objective's: being linear, it
        gives what timm's `mixup_target` gives.
    """
    if "mix/lam" not in drawn:
        return batch
    if batch.labels is None or len(batch) % 2:
        raise ValueError(f"mixing: expected labels and an even batch, found {len(batch)} samples")
    lam, boxes = drawn["mix/lam"], drawn["mix/box"]
    cut = boxes[:, 2] * boxes[:, 3] > 0
    views = tuple(_mix_views(view, lam, boxes, cut) for view in batch.views)
    labels = batch.labels.float() if batch.labels.ndim == 2 else F.one_hot(batch.labels, num_classes).float()
    share = lam.to(labels.device, non_blocking=True).view(-1, 1)
    return replace(batch, views=views, labels=labels * share + _partners(labels) * (1 - share))


def _mix_views(images: Tensor, lam: Tensor, boxes: Tensor, cut: Tensor) -> Tensor:
    apply_to_selected(images, cut, _paste, boxes)
    apply_to_selected(images, (lam < 1) & ~cut, _blend, lam)
    return images


def _paste(images: Tensor, boxes: Tensor) -> Tensor:
    return torch.where(inside(boxes, *images.shape[2:]), _partners(images), images)


def _blend(images: Tensor, lam: Tensor) -> Tensor:
    share = as_column(lam)
    return images * share + _partners(images) * (1 - share)


def _partners(values: Tensor) -> Tensor:
    """The other one of each pair, in its place."""
    return values.view(-1, 2, *values.shape[1:]).flip(1).flatten(0, 1)
