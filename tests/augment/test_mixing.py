"""Mixing of pairs, against a loop over them and timm's soft labels; erasing, against slices."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from timm.data.mixup import mixup_target
from torch import Tensor
from torch.nn import functional as F

from data_pipeline.batch import Batch
from data_pipeline.samples.config import Mixing
from data_pipeline.samples.draws import draw_mix
from pretrain.augment.erasing import erase, noise
from pretrain.augment.mixing import mix

CLASSES = 7


def pairs(seed: int, count: int, size: int) -> tuple[Batch, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    spec = Mixing(mixup=0.8, cutmix=1.0, probability=0.8)
    drawn = [draw_mix(spec, size=size, seed=seed, cursor=0, pair=i // 2) for i in range(2 * count)]
    batch = Batch(
        tuple(map(str, range(2 * count))),
        (torch.randn(2 * count, 3, size, size, generator=generator),) * 2,
        labels=torch.randint(CLASSES, (2 * count,), generator=generator),
    )
    batch = Batch(batch.keys, tuple(view.clone() for view in batch.views), labels=batch.labels)
    return batch, {name: torch.tensor([row[name] for row in drawn]) for name in drawn[0]}


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 5), size=st.integers(1, 20))
def test_pairs_take_from_each_other(seed: int, count: int, size: int) -> None:
    batch, drawn = pairs(seed, count, size)
    before = [view.clone() for view in batch.views]
    mixed = mix(batch, drawn, CLASSES)
    for row in range(2 * count):
        lam, (top, left, height, width) = float(drawn["mix/lam"][row]), drawn["mix/box"][row].tolist()
        partner = row + 1 if row % 2 == 0 else row - 1
        for view, images in zip(mixed.views, before, strict=True):
            if height:
                expected = images[row].clone()
                box = (slice(None), slice(top, top + height), slice(left, left + width))
                expected[box] = images[partner][box]
                assert torch.equal(view[row], expected)
            else:
                expected = lam * images[row] + (1 - lam) * images[partner]
                torch.testing.assert_close(view[row], expected, rtol=0, atol=1e-6)
            if lam == 1:
                assert torch.equal(view[row], images[row])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_that_of_timm_s_soft_labels(smoothing: float) -> None:
    """Mixed here and smoothed by the loss, or both by timm's `mixup_target` and no smoothing in the loss."""
    batch, drawn = pairs(0, 3, 4)
    assert batch.labels is not None
    logits = torch.randn(6, CLASSES, generator=torch.Generator().manual_seed(7))
    ours = mix(batch, drawn, CLASSES).labels
    assert ours is not None
    torch.testing.assert_close(ours.sum(1), torch.ones(6))
    for first in (0, 2, 4):
        pair = slice(first, first + 2)
        lam = float(drawn["mix/lam"][first])
        theirs = mixup_target(batch.labels[pair], CLASSES, lam, smoothing)
        loss = F.cross_entropy(logits[pair], ours[pair], label_smoothing=smoothing)
        torch.testing.assert_close(loss, F.cross_entropy(logits[pair], theirs))


def test_soft_labels_are_mixed_as_they_are() -> None:
    batch, drawn = pairs(0, 3, 4)
    assert batch.labels is not None
    soft = Batch(batch.keys, batch.views, labels=F.one_hot(batch.labels, CLASSES).float())
    hard, found = mix(batch, drawn, CLASSES).labels, mix(soft, drawn, CLASSES).labels
    assert hard is not None
    assert found is not None
    assert torch.equal(hard, found)


def test_without_draws_labels_stay_plain() -> None:
    batch, _ = pairs(0, 3, 4)
    assert mix(batch, {}, CLASSES) is batch


def test_erasing_fills_the_box_and_nothing_else() -> None:
    images = torch.randn(3, 3, 9, 11, generator=torch.Generator().manual_seed(7))
    boxes = torch.tensor([[0, 0, 2, 3], [4, 5, 5, 6], [3, 3, 1, 1]])
    seeds = torch.tensor([1, 2**62, 3])
    constant, noisy = erase(images, boxes), erase(images, boxes, seeds)
    filling = noise(seeds, images[0].shape)
    for row, (top, left, height, width) in enumerate(boxes.tolist()):
        box = (slice(None), slice(top, top + height), slice(left, left + width))
        for found, fill in ((constant[row], torch.zeros(3, 9, 11)), (noisy[row], filling[row])):
            expected = images[row].clone()
            expected[box] = fill[box]
            assert torch.equal(found, expected)


def test_noise_is_standard_normal_and_its_seed_s_own() -> None:
    seeds = torch.tensor([5, 6, 2**63 - 1])
    found = noise(seeds, torch.Size([3, 64, 64]))
    assert found.dtype == torch.float32
    assert torch.equal(found[1:2], noise(seeds[1:2], torch.Size([3, 64, 64])))
    for values in found.flatten(1).double():
        assert stats.kstest(values.numpy(), "norm").pvalue > 1e-4
        assert abs(float((values[1:] * values[:-1]).mean())) < 5 / math.sqrt(values.numel())
    assert abs(float((found[0] * found[1]).mean())) < 5 / math.sqrt(found[0].numel())


def test_the_noise_of_a_seed_never_changes() -> None:
    assert noise(torch.tensor([7]), torch.Size([1, 1, 4])).tolist()[0][0][0] == pytest.approx(
        [1.103580, -0.300342, 0.320249, 0.285012], abs=1e-6
    )
