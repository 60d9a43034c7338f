"""Normalising on the device equals torchvision's on the host, for every value a pixel can have."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torchvision.transforms.v2 import functional as reference

from data_pipeline.batch import Batch
from pretrain.augment import normalize

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def make_batch() -> Batch:
    every_value = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    noise = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8)
    return Batch(("a", "b"), (every_value, noise), labels=torch.tensor([1, 0]), masks=torch.ones(2, 4).bool())


def test_every_view_equals_torchvision_s() -> None:
    batch = make_batch()
    before = tuple(view.clone() for view in batch.views)
    views = normalize(batch, MEAN, STD).views
    assert len(views) == 2
    for view, original, was in zip(views, batch.views, before, strict=True):
        expected = reference.normalize(reference.to_dtype(original, torch.float32, scale=True), list(MEAN), list(STD))
        assert view.dtype == torch.float32
        torch.testing.assert_close(view, expected, rtol=1e-6, atol=1e-6)
        assert torch.equal(original, was)


def test_nothing_but_the_views_changes() -> None:
    batch = make_batch()
    assert replace(normalize(batch, MEAN, STD), views=batch.views) == batch


def test_normalising_twice_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected uint8, found torch\.float32"):
        normalize(normalize(make_batch(), MEAN, STD), MEAN, STD)
