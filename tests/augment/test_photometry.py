"""Colour operations equal torchvision's on float images, for any image, parameter and size."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as reference

from pretrain.augment.photometry import (
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    blur,
    blur_kernels,
    blur_radius,
    grayscale,
    jitter,
    solarize,
)

FEW = settings(max_examples=60, deadline=None)
CLOSE = 2e-6  # of the range of a pixel, about eight times fp32's step at 1


@st.composite
def images(draw: st.DrawFn, count: st.SearchStrategy[int] = st.integers(1, 4)) -> Tensor:  # noqa: B008
    """[n, 3, H, W] in [0, 1], each pixel a level of 8 bits: noise, noise of few levels (ties, greys), or one colour."""
    shape = (draw(count), 3, draw(st.integers(1, 24)), draw(st.integers(1, 24)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    levels = draw(st.sampled_from([2, 4, 256]))
    flat = draw(st.booleans())
    pixels = torch.randint(levels, (*shape[:2], 1, 1) if flat else shape, generator=generator) * (255 // (levels - 1))
    return pixels.expand(shape).float().div(255).contiguous()


def each(values: list[float], batch: Tensor) -> Tensor:
    return torch.tensor((values * len(batch))[: len(batch)])


factors = st.lists(st.floats(0, 3), min_size=1, max_size=4)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (adjust_brightness, reference.adjust_brightness),
        (adjust_contrast, reference.adjust_contrast),
        (adjust_saturation, reference.adjust_saturation),
    ],
)
@FEW
@given(batch=images(), values=factors)
def test_factors(
    ours: Callable[[Tensor, Tensor], Tensor],
    theirs: Callable[[Tensor, float], Tensor],
    batch: Tensor,
    values: list[float],
) -> None:
    found = ours(batch, each(values, batch))
    for row, value in enumerate(each(values, batch).tolist()):
        torch.testing.assert_close(found[row], theirs(batch[row], value), rtol=0, atol=CLOSE)


@FEW
@given(batch=images(), values=st.lists(st.floats(-0.5, 0.5), min_size=1, max_size=4))
def test_hue(batch: Tensor, values: list[float]) -> None:
    found = adjust_hue(batch, each(values, batch))
    for row, value in enumerate(each(values, batch).tolist()):
        torch.testing.assert_close(found[row], reference.adjust_hue(batch[row], value), rtol=0, atol=4 * CLOSE)


@FEW
@given(batch=images())
def test_grey_and_solarise(batch: Tensor) -> None:
    torch.testing.assert_close(grayscale(batch), reference.rgb_to_grayscale(batch, 3), rtol=0, atol=CLOSE)
    torch.testing.assert_close(solarize(batch), reference.solarize(batch, 0.5), rtol=0, atol=0)


@FEW
@given(batch=images(), sigmas=st.lists(st.floats(0.1, 2), min_size=1, max_size=4), data=st.data())
def test_blur(batch: Tensor, sigmas: list[float], data: st.DataObject) -> None:
    radius = data.draw(st.integers(0, min(batch.shape[2:]) - 1))
    found = blur(batch, blur_kernels(each(sigmas, batch), radius))
    for row, sigma in enumerate(each(sigmas, batch).tolist()):
        expected = reference.gaussian_blur(batch[row], [2 * radius + 1] * 2, [sigma] * 2)
        torch.testing.assert_close(found[row], expected, rtol=0, atol=CLOSE)


def test_the_blur_s_kernel_is_byol_s_at_224_and_scales() -> None:
    assert [2 * blur_radius(size) + 1 for size in (1, 2, 32, 96, 224, 384)] == [1, 3, 3, 9, 23, 39]


@FEW
@given(
    batch=images(),
    order=st.permutations([0, 1, 2, 3]),
    strengths=st.tuples(st.floats(0.6, 1.4), st.floats(0.6, 1.4), st.floats(0.6, 1.4), st.floats(-0.4, 0.4)),
)
def test_jitter_is_torchvision_s_with_the_order_of_each_image(
    batch: Tensor, order: list[int], strengths: tuple[float, ...]
) -> None:
    """Every other image has the reverse order; hue among the others can widen a rounding by its slope of 6."""
    theirs = (
        reference.adjust_brightness,
        reference.adjust_contrast,
        reference.adjust_saturation,
        reference.adjust_hue,
    )
    orders = torch.tensor([order, order[::-1]] * 2)[: len(batch)]
    expected = batch.clone()
    for row, turns in enumerate(orders.tolist()):
        for number in turns:
            expected[row] = theirs[number](expected[row], float(np.float32(strengths[number])))
    found = batch.clone()
    jitter(found, orders, torch.tensor([strengths] * len(batch)))
    torch.testing.assert_close(found, expected, rtol=0, atol=20 * CLOSE)


def test_against_the_rounding_of_a_pipeline_over_pil_images() -> None:
    """PIL cuts fractions of a level off after each of the three operations: half a level each on average."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    image: Image.Image | Tensor = Image.fromarray(pixels)
    found = torch.from_numpy(pixels).permute(2, 0, 1).unsqueeze(0).float() / 255
    theirs = (reference.adjust_brightness, reference.adjust_saturation, reference.adjust_contrast)
    for adjust, factor in zip(theirs, (0.8, 1.1, 0.7), strict=True):
        image = adjust(image, factor)
    jitter(found, torch.tensor([[0, 2, 1, -1]]), torch.tensor([[0.8, 0.7, 1.1, 0.0]]))
    difference = (found[0].permute(1, 2, 0) * 255 - torch.from_numpy(np.array(image))).abs()
    assert difference.max() < 3
    assert difference.mean() < 1.5
