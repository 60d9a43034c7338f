"""Geometry on the host: random resized crop and flip for training, resize and center crop for evaluation.

What is drawn for a view depends on (seed, epoch, key, view) alone. Images are uint8 arrays [H, W, 3], views
uint8 tensors [3, size, size]. Resizing is antialiased in uint8, equal to torchvision's on tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from data_pipeline.batch import MaskSpec
from data_pipeline.order import keyed
from data_pipeline.samples.config import Views
from data_pipeline.samples.preprocessing import Preprocessing

Image = NDArray[np.uint8]
Box = tuple[int, int, int, int]  # top, left, height, width, in pixels

_TRIES = 10


def training_view(image: Image, size: int, views: Views, *, seed: int, epoch: int, key: str, view: int) -> Tensor:
    """One random crop, resized and perhaps flipped, [3, size, size] uint8."""
    return drawn_view(image, size, views, seed=seed, epoch=epoch, key=key, view=view)[0]


def drawn_view(
    image: Image, size: int, views: Views, *, seed: int, epoch: int, key: str, view: int
) -> tuple[Tensor, bool]:
    """A `training_view`, and whether its crop was drawn; if not, no crop by `views` fitted in the image."""
    draws = keyed.uniforms("view", seed, epoch, view, key)
    flip = next(draws) < views.flip
    drawn = draw_box(image.shape[0], image.shape[1], views, draws)
    top, left, height, width = drawn or centered_box(image.shape[0], image.shape[1], views)
    resized = resize(image[top : top + height, left : left + width], (size, size), views.interpolation)
    return resized.flip(-1) if flip else resized, drawn is not None


def crop_box(height: int, width: int, views: Views, draws: Iterator[float]) -> Box:
    """Box of a random crop: `draw_box`, or `centered_box` where that finds none, as in torchvision."""
    return draw_box(height, width, views, draws) or centered_box(height, width, views)


def draw_box(height: int, width: int, views: Views, draws: Iterator[float]) -> Box | None:
    """Box of a random crop; None: none was found that fits in the image.

    - area: a random resized crop (Szegedy et al. 2015, sec. 6), as torchvision's `RandomResizedCrop` draws it: ten
      tries at an area uniform in `scale` and a ratio log-uniform in `ratio`.
    - square: a square of the image's shorter side, anywhere along the longer one (Radford et al. 2021, sec. 2.4, who
      resize first: up to what the filter sees beyond the border the same).

    Args:
        height, width: of the image, pixels.
        draws: numbers in [0, 1): area and ratio of each try, then top and left of the one that fits.
    """
    if views.crop == "square":
        side = min(height, width)
        return int(next(draws) * (height - side + 1)), int(next(draws) * (width - side + 1)), side, side
    low, high = math.log(views.ratio[0]), math.log(views.ratio[1])
    for _ in range(_TRIES):
        area = height * width * (views.scale[0] + (views.scale[1] - views.scale[0]) * next(draws))
        ratio = math.exp(low + (high - low) * next(draws))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(next(draws) * (height - h + 1)), int(next(draws) * (width - w + 1)), h, w
    return None


def centered_box(height: int, width: int, views: Views) -> Box:
    """The largest centered box within `ratio`: the same for an image each time."""
    w = min(width, max(1, round(height * views.ratio[1])))
    h = min(height, max(1, round(width / views.ratio[0])))
    return (height - h) // 2, (width - w) // 2, h, w


def evaluation_size(height: int, width: int, preprocessing: Preprocessing) -> tuple[int, int]:
    """Height and width of the resized image that `evaluation_view` takes its center crop from."""
    # As timm has it; a share such as 224 / 256 is no exact float.
    short = math.floor(preprocessing.image_size / preprocessing.eval_crop + 1e-6)
    if preprocessing.eval_resize == "square":
        return short, short
    if height <= width:
        return short, int(short * width / height)
    return int(short * height / width), short


def evaluation_view(image: Image, preprocessing: Preprocessing) -> Tensor:
    """The center of the resized image, as torchvision has it, [3, S, S]; the resize goes to floor(S / eval_crop)."""
    size = preprocessing.image_size
    height, width = evaluation_size(image.shape[0], image.shape[1], preprocessing)
    resized = resize(image, (height, width), preprocessing.interpolation)
    top, left = round((height - size) / 2), round((width - size) / 2)
    return resized[:, top : top + size, left : left + size]


def resize(image: Image, size: tuple[int, int], interpolation: str) -> Tensor:
    """Antialiased resize of uint8 [H, W, 3], which may be a slice of a larger one, to uint8 [3, *size]."""
    pixels = torch.from_numpy(image).permute(2, 0, 1).unsqueeze(0)
    return interpolate(pixels, size, mode=interpolation, antialias=True).squeeze(0)


def patch_mask(spec: MaskSpec, *, seed: int, epoch: int, key: str, view: int = 0) -> Tensor:
    """Uniformly random patches, exactly `num_hidden` of them True (hidden), [num_patches] bool."""
    words = keyed.words("mask", seed, epoch, view, key, count=spec.num_patches)
    mask = np.zeros(spec.num_patches, np.bool_)
    mask[np.argsort(words, kind="stable")[: spec.num_hidden]] = True
    return torch.from_numpy(mask)
