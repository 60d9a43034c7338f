"""RandAugment agrees with timm's operations on Pillow images: colour to the last bit, geometry within a level."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data import auto_augment as timm
from torch import Tensor

from data_pipeline.samples.rand_augment import RandOp, operation_argument
from pretrain.augment.rand_augment import rand_augment

FILL = (0.485, 0.456, 0.406)
COLOUR: dict[RandOp, Callable[..., Image.Image]] = {
    RandOp.AUTO_CONTRAST: lambda image, _: timm.auto_contrast(image),
    RandOp.EQUALIZE: lambda image, _: timm.equalize(image),
    RandOp.INVERT: lambda image, _: timm.invert(image),
    RandOp.POSTERIZE: lambda image, bits: timm.posterize(image, int(bits)),
    RandOp.SOLARIZE: timm.solarize,
    RandOp.SOLARIZE_ADD: lambda image, levels: timm.solarize_add(image, int(levels)),
    RandOp.COLOR: timm.color,
    RandOp.CONTRAST: timm.contrast,
    RandOp.BRIGHTNESS: timm.brightness,
    RandOp.SHARPNESS: timm.sharpness,
}
GEOMETRY: dict[RandOp, Callable[..., Image.Image]] = {
    RandOp.ROTATE: timm.rotate,
    RandOp.SHEAR_X: timm.shear_x,
    RandOp.SHEAR_Y: timm.shear_y,
    RandOp.TRANSLATE_X: timm.translate_x_rel,
    RandOp.TRANSLATE_Y: timm.translate_y_rel,
}


@st.composite
def pictures(draw: st.DrawFn) -> np.ndarray:
    """[H, W, 3] uint8: noise over all levels, over few, a slope, or one colour."""
    height, width = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    match draw(st.sampled_from(["noise", "few", "slope", "flat"])):
        case "noise":
            return rng.integers(0, 256, (height, width, 3), np.uint8)
        case "few":
            return rng.choice(rng.integers(0, 256, 3), (height, width, 3)).astype(np.uint8)
        case "slope":
            slope = np.add.outer(3 * np.arange(height), 2 * np.arange(width))
            return (slope[..., None] + [0, 40, 9]).clip(0, 255).astype(np.uint8)
        case _:
            return np.broadcast_to(rng.integers(0, 256, 3, np.uint8), (height, width, 3)).copy()


def planes(picture: np.ndarray) -> Tensor:
    return torch.from_numpy(picture.transpose(2, 0, 1).copy()).unsqueeze(0)


arguments = {
    "level": st.floats(0, 1),
    "sign": st.sampled_from([-1, 1]),
    "increasing": st.booleans(),
}


@pytest.mark.parametrize("operation", COLOUR, ids=lambda operation: operation.name)
@settings(max_examples=40, deadline=None)
@given(picture=pictures(), **arguments)
def test_colour(operation: RandOp, picture: np.ndarray, level: float, sign: int, increasing: bool) -> None:
    argument = float(np.float32(operation_argument(operation, level, sign, increasing)))
    expected = np.array(COLOUR[operation](Image.fromarray(picture), argument))
    batch = planes(picture)
    rand_augment(batch, torch.tensor([[operation]]), torch.tensor([[argument]]), FILL)
    assert np.array_equal(batch[0].permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("operation", GEOMETRY, ids=lambda operation: operation.name)
@settings(max_examples=40, deadline=None)
@given(picture=pictures(), **arguments)
def test_geometry(operation: RandOp, picture: np.ndarray, level: float, sign: int, increasing: bool) -> None:
    """One level at most, but where a pixel's source lies on the border of the image, to fp32's precision."""
    argument = float(np.float32(operation_argument(operation, level, sign, increasing)))
    options: dict[str, Any] = {
        "resample": Image.Resampling.BILINEAR,
        "fillcolor": tuple(round(255 * share) for share in FILL),
    }
    nudged = [argument * (1 - 1e-4) - 1e-6, argument, argument * (1 + 1e-4) + 1e-6]
    expected = np.stack([GEOMETRY[operation](Image.fromarray(picture), a, **options) for a in nudged]).astype(int)
    on_border = (expected.max(0) - expected.min(0)).max(-1, keepdims=True) > 1
    batch = planes(picture)
    rand_augment(batch, torch.tensor([[operation]]), torch.tensor([[argument]]), FILL)
    difference = abs(batch[0].permute(1, 2, 0).numpy().astype(int) - expected[1])
    assert (difference * ~on_border).max() <= 1
    assert on_border.mean() < 0.2 or picture.size < 3 * 200


@pytest.mark.parametrize("operation", [RandOp.TRANSLATE_X, RandOp.TRANSLATE_Y])
@pytest.mark.parametrize("pixels", [-9, 1, 4])
def test_a_shift_by_whole_pixels_is_exact(operation: RandOp, pixels: int) -> None:
    """fp32 falls a little short of some whole levels, and cutting off fractions would darken them by one."""
    picture = np.random.default_rng(0).integers(0, 256, (30, 30, 3), np.uint8)
    options: dict[str, Any] = {"resample": Image.Resampling.BILINEAR, "fillcolor": (124, 116, 104)}
    expected = np.array(GEOMETRY[operation](Image.fromarray(picture), pixels / 30, **options))
    batch = planes(picture)
    rand_augment(batch, torch.tensor([[operation]]), torch.tensor([[pixels / 30]]), FILL)
    assert np.array_equal(batch[0].permute(1, 2, 0).numpy(), expected)


def test_each_image_has_its_own_operations_layer_by_layer() -> None:
    rng = np.random.default_rng(0)
    batch = torch.from_numpy(rng.integers(0, 256, (60, 3, 12, 14), np.uint8))
    operations = torch.from_numpy(rng.integers(-1, 15, (60, 3)))
    levels = torch.tensor(
        [[operation_argument(RandOp(max(o, 0)), 0.6, 1, True) for o in row] for row in operations.tolist()]
    )
    expected = batch.clone()
    for row in range(60):
        for layer in range(3):
            one = expected[row : row + 1]
            rand_augment(
                one, operations[row : row + 1, layer : layer + 1], levels[row : row + 1, layer : layer + 1], FILL
            )
    untouched = (operations == -1).all(1)
    before = batch.clone()
    rand_augment(batch, operations, levels, FILL)
    assert torch.equal(batch, expected)
    assert torch.equal(batch[untouched], before[untouched])
    assert not torch.equal(batch, before)
