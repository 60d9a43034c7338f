"""Views: torchvision's geometry, drawn from (seed, epoch, key, view) and nothing else."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import timm
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image as PillowImage
from torchvision.transforms import InterpolationMode, RandomResizedCrop, Resize
from torchvision.transforms.v2 import functional as torchvision

from data_pipeline.batch import MaskSpec
from data_pipeline.order import keyed
from data_pipeline.samples.config import Views
from data_pipeline.samples.views import (
    crop_box,
    draw_box,
    drawn_view,
    evaluation_size,
    evaluation_view,
    patch_mask,
    resize,
    training_view,
)
from tests.data_pipeline.tiny import evaluated

sides = st.integers(1, 90)
view_sides = st.integers(2, 40)  # torchvision fails at one pixel, on an assertion in torch
interpolations = st.sampled_from(["bilinear", "bicubic"])


def image(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def channels_first(pixels: NDArray[np.uint8]) -> torch.Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


@settings(max_examples=60, deadline=None)
@given(sides, sides, st.data(), interpolations)
def test_a_resized_slice_equals_torchvisions_resized_crop(
    height: int, width: int, data: st.DataObject, interpolation: str
) -> None:
    h, w = data.draw(st.integers(1, height)), data.draw(st.integers(1, width))
    top, left = data.draw(st.integers(0, height - h)), data.draw(st.integers(0, width - w))
    size = [data.draw(view_sides), data.draw(view_sides)]
    pixels = image(height, width)
    ours = resize(pixels[top : top + h, left : left + w], (size[0], size[1]), interpolation)
    mode = InterpolationMode(interpolation)
    theirs = torchvision.resized_crop(channels_first(pixels), top, left, h, w, size, mode, antialias=True)
    assert torch.equal(ours, theirs)


def test_a_photograph_is_resized_as_pillow_resizes_it() -> None:
    smooth = np.array(PillowImage.fromarray(image(12, 16)).resize((320, 240), PillowImage.Resampling.BICUBIC))
    theirs = PillowImage.fromarray(smooth).resize((96, 96), PillowImage.Resampling.BICUBIC)
    difference = resize(smooth, (96, 96), "bicubic").permute(1, 2, 0).int() - torch.from_numpy(np.array(theirs)).int()
    assert difference.abs().max() <= 1


@settings(max_examples=60, deadline=None)
@given(sides, sides, view_sides, st.floats(0.5, 1), interpolations)
@example(90, 67, 32, 0.875, "bicubic")
def test_an_evaluation_view_equals_torchvisions_resize_and_centre_crop(
    height: int, width: int, size: int, eval_crop: float, interpolation: str
) -> None:
    pixels = image(height, width)
    spec = evaluated(size, eval_crop=eval_crop, interpolation=interpolation)
    mode = InterpolationMode(interpolation)
    short = math.floor(size / eval_crop + 1e-6)
    resized = torchvision.resize(channels_first(pixels), [short], mode, antialias=True)
    assert tuple(resized.shape[1:]) == evaluation_size(height, width, spec)
    assert torch.equal(evaluation_view(pixels, spec), torchvision.center_crop(resized, [size, size]))


@settings(max_examples=300, deadline=None)
@given(
    sides,
    sides,
    st.floats(0.01, 1),
    st.floats(1e-9, 1),
    st.floats(0.2, 1),
    st.floats(1, 5),
    st.integers(0, 10**6),
)
def test_a_crop_lies_in_the_image(
    height: int, width: int, high: float, low: float, narrow: float, wide: float, key: int
) -> None:
    spec = Views(scale=(low * high, high), ratio=(narrow, wide))
    top, left, h, w = crop_box(height, width, spec, keyed.uniforms("test", 0, 0, 0, str(key)))
    assert h >= 1
    assert w >= 1
    assert 0 <= top <= height - h
    assert 0 <= left <= width - w


@pytest.mark.parametrize(("height", "width"), [(3, 400), (400, 3), (1, 1), (50, 70)])
def test_where_no_try_fits_the_centre_is_taken_as_by_torchvision(height: int, width: int) -> None:
    spec = Views.model_construct(scale=(1.2, 1.3))  # never fits, so no recipe has it
    theirs = RandomResizedCrop.get_params(channels_first(image(height, width)), [1.2, 1.3], list(spec.ratio))
    assert crop_box(height, width, spec, itertools.repeat(0.5)) == tuple(theirs)


@pytest.mark.parametrize(("height", "width", "scale"), [(300, 500, (0.2, 1.0)), (500, 120, (0.08, 1.0))])
def test_crops_are_distributed_as_torchvisions(height: int, width: int, scale: tuple[float, float]) -> None:
    """Deciles of area, shape and place; at 3,000 draws a side they err by about 1 % of the range."""
    spec = Views(scale=scale)
    picture = torch.empty(3, height, width, dtype=torch.uint8)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = [RandomResizedCrop.get_params(picture, list(scale), list(spec.ratio)) for _ in range(3000)]
    ours = [crop_box(height, width, spec, keyed.uniforms("test", 0, 0, 0, str(i))) for i in range(3000)]
    for describe in (
        lambda top, left, h, w: h * w / (height * width),
        lambda top, left, h, w: w / h,
        lambda top, left, h, w: top / height,
        lambda top, left, h, w: left / width,
    ):
        a, b = ([describe(*box) for box in boxes] for boxes in (ours, theirs))
        deciles = np.linspace(0.1, 0.9, 9)
        spread = max(b) - min(b)
        assert np.abs(np.quantile(a, deciles) - np.quantile(b, deciles)).max() < 0.05 * spread


def test_flipping_mirrors_the_same_crop() -> None:
    never, always = Views(flip=0), Views(flip=1)
    draws = {"seed": 1, "epoch": 2, "key": "a", "view": 0}
    plain = training_view(image(40, 50), 16, never, **draws)  # type: ignore[arg-type]
    assert torch.equal(training_view(image(40, 50), 16, always, **draws), plain.flip(-1))  # type: ignore[arg-type]


def test_half_of_the_views_are_flipped() -> None:
    def view(spec: Views, key: str) -> torch.Tensor:
        return training_view(image(4, 5), 4, spec, seed=0, epoch=0, key=key, view=0)

    flipped = [not torch.equal(view(Views(), str(i)), view(Views(flip=0), str(i))) for i in range(400)]
    assert 150 < sum(flipped) < 250


def test_seed_epoch_key_and_view_each_change_the_view_and_nothing_else_does() -> None:
    pixels, spec = image(60, 80), Views()
    base = {"seed": 0, "epoch": 0, "key": "a", "view": 0}
    variants = [base, base | {"seed": 1}, base | {"epoch": 1}, base | {"key": "b"}, base | {"view": 1}]
    views = [training_view(pixels, 24, spec, **draws) for draws in variants]  # type: ignore[arg-type]
    assert len({view.numpy().tobytes() for view in views}) == len(variants)
    torch.manual_seed(5)
    np.random.seed(5)
    assert torch.equal(training_view(pixels, 24, spec, **base), views[0])  # type: ignore[arg-type]


def test_what_is_drawn_for_a_key_never_changes() -> None:
    """A run that goes on under a later version must go on with its crops and masks: these are a promise."""
    draws = keyed.uniforms("view", 3, 1, 0, "n01440764/10026")
    assert next(draws) == 0.19608550242037193
    assert crop_box(375, 500, Views(), draws) == (31, 4, 254, 203)
    mask = patch_mask(MaskSpec(16, 12), seed=3, epoch=1, key="n01440764/10026")
    assert (~mask).nonzero().flatten().tolist() == [3, 4, 5, 15]


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 300), st.floats(0, 1), st.integers(0, 100), st.text(max_size=8))
def test_a_mask_hides_exactly_as_many_as_asked(num_patches: int, share: float, epoch: int, key: str) -> None:
    spec = MaskSpec(num_patches, int(share * num_patches))
    mask = patch_mask(spec, seed=0, epoch=epoch, key=key)
    assert mask.shape == (num_patches,)
    assert mask.dtype == torch.bool
    assert int(mask.sum()) == spec.num_hidden
    assert torch.equal(mask, patch_mask(spec, seed=0, epoch=epoch, key=key))


def test_masks_differ_and_hide_every_patch_equally_often() -> None:
    spec = MaskSpec(16, 12)
    masks = torch.stack([patch_mask(spec, seed=0, epoch=i % 2, key=str(i // 2)) for i in range(2000)])
    assert len({mask.numpy().tobytes() for mask in masks}) > 1000  # of 1,820 there are
    assert (masks.float().mean(0) - 0.75).abs().max() < 0.05  # five standard errors


@pytest.mark.parametrize("size", [160, 224, 288, 384])
@pytest.mark.parametrize("eval_crop", [0.875, 0.9, 0.95, 1.0])
def test_evaluation_sizes_are_timms(size: int, eval_crop: float) -> None:
    transform = timm.data.create_transform((3, size, size), crop_pct=eval_crop, interpolation="bicubic")
    (resized,) = (step.size for step in transform.transforms if isinstance(step, Resize))
    assert evaluation_size(400, 600, evaluated(size, eval_crop=eval_crop))[0] == resized


@pytest.mark.parametrize("resized", range(200, 300))
def test_a_share_of_two_whole_numbers_gives_them_back(resized: int) -> None:
    assert evaluation_size(400, 600, evaluated(200, eval_crop=200 / resized))[0] == resized


SQUARE = Views(crop="square", flip=0)


@settings(max_examples=100, deadline=None)
@given(sides, sides, st.integers(0, 10**6))
def test_a_square_crop_is_as_large_as_the_image_allows(height: int, width: int, key: int) -> None:
    box = draw_box(height, width, SQUARE, keyed.uniforms("test", 0, 0, 0, str(key)))
    assert box is not None
    top, left, h, w = box
    assert h == w == min(height, width)
    assert 0 <= top <= height - h
    assert 0 <= left <= width - w


def test_a_square_crop_of_a_photograph_lies_anywhere_along_its_longer_side() -> None:
    lefts = [crop_box(30, 45, SQUARE, keyed.uniforms("test", 0, 0, 0, str(i)))[1] for i in range(1600)]
    counts = np.bincount(lefts, minlength=16)
    assert len(counts) == 16
    assert counts.min() > 60  # four standard errors below 100
    views = [training_view(image(30, 45), 8, SQUARE, seed=0, epoch=e, key="a", view=0) for e in range(50)]
    assert len({view.numpy().tobytes() for view in views}) > 10


def test_a_square_view_is_the_crop_of_the_resized_image() -> None:
    """CLIP's order is resize, then crop: where the corner falls on a whole pixel of both, the inside is the same."""
    smooth = np.array(PillowImage.fromarray(image(6, 9)).resize((480, 320), PillowImage.Resampling.BICUBIC))
    top, left, side, _ = crop_box(320, 480, SQUARE, iter([0.0, 80.5 / 161]))
    assert (top, left, side) == (0, 80, 320)
    ours = resize(smooth[top : top + side, left : left + side], (64, 64), "bicubic")
    theirs = resize(smooth, (64, 96), "bicubic")[:, :, 16:80]
    assert (ours.int() - theirs.int())[:, 2:-2, 2:-2].abs().max() <= 1


def test_a_view_says_whether_its_crop_was_drawn() -> None:
    """The caption recipes once asked for nine tenths of a photograph as a square: there is no such part of it."""
    narrow, wide = Views(scale=(0.9, 1.0), ratio=(1, 1), flip=0), Views(scale=(0.9, 1.0), flip=0)
    for shape, spec, expected in (
        ((30, 45), narrow, False), ((30, 30), narrow, True), ((30, 45), wide, False), ((30, 36), wide, True),
        ((30, 45), SQUARE, True), ((5, 90), Views(), False), ((5, 90), SQUARE, True),
    ):  # fmt: skip
        drawn = {drawn_view(image(*shape), 8, spec, seed=0, epoch=e, key="a", view=0)[1] for e in range(8)}
        assert drawn == {expected}, (shape, spec)
