"""Geometry on the host: random resized crop and flip for training, resize and centre crop for evaluation.

What is drawn for a view depends on (seed, epoch, key, view) alone. Images are uint8 arrays [H, W, 3], views
uint8 tensors [3, size, size]. Resizing is antialiased in uint8, equal to torchvision's on tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from data_pipeline.batch import MaskSpec
from data_pipeline.order import keyed

Image = NDArray[np.uint8]
Box = tuple[int, int, int, int]  # top, left, height, width, in pixels

_TRIES = 10


@dataclass(frozen=True)
class ViewSpec:
    """Geometry of training views and of evaluation views.

    Attributes:
        scale: least and greatest area of the crop, as a share of the image's.
        ratio: least and greatest width / height of the crop.
        flip: probability of a horizontal flip.
        interpolation: filter of the antialiased resize.
        eval_crop: side of the centre crop, as a share of the resized shorter side.
        eval_resize: shorter: of the shorter side, the ratio kept; square: of both, which distorts what is not square.
    """

    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (0.75, 4 / 3)
    flip: float = 0.5
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    eval_crop: float = 1.0
    eval_resize: Literal["shorter", "square"] = "shorter"

    @property
    def resizing(self) -> str:
        """That of evaluation views in words, for a report."""
        sides = "the shorter side" if self.eval_resize == "shorter" else "both sides, to a square"
        return f"antialiased, of {sides}, then a centre crop"


def training_view(image: Image, size: int, spec: ViewSpec, *, seed: int, epoch: int, key: str, view: int) -> Tensor:
    """One random resized crop, perhaps flipped, [3, size, size] uint8."""
    draws = keyed.uniforms("view", seed, epoch, view, key)
    flip = next(draws) < spec.flip
    top, left, height, width = crop_box(image.shape[0], image.shape[1], spec, draws)
    resized = resize(image[top : top + height, left : left + width], (size, size), spec.interpolation)
    return resized.flip(-1) if flip else resized


def crop_box(height: int, width: int, spec: ViewSpec, draws: Iterator[float]) -> Box:
    """Box of a random resized crop (Szegedy et al. 2015, sec. 6), as in torchvision's `RandomResizedCrop`.

    Ten tries at an area uniform in `scale` and a ratio log-uniform in `ratio`; where none fits in the image,
    the largest centred box within `ratio`.

    Args:
        height, width: of the image, pixels.
        draws: numbers in [0, 1): area and ratio of each try, then top and left of the one that fits.
    """
    low, high = math.log(spec.ratio[0]), math.log(spec.ratio[1])
    for _ in range(_TRIES):
        area = height * width * (spec.scale[0] + (spec.scale[1] - spec.scale[0]) * next(draws))
        ratio = math.exp(low + (high - low) * next(draws))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(next(draws) * (height - h + 1)), int(next(draws) * (width - w + 1)), h, w
    w = min(width, max(1, round(height * spec.ratio[1])))
    h = min(height, max(1, round(width / spec.ratio[0])))
    return (height - h) // 2, (width - w) // 2, h, w


def evaluation_size(height: int, width: int, size: int, spec: ViewSpec) -> tuple[int, int]:
    """Height and width of the resized image that `evaluation_view` takes its centre crop from."""
    short = math.floor(size / spec.eval_crop + 1e-6)  # as timm has it; a share such as 224 / 256 is no exact float
    if spec.eval_resize == "square":
        return short, short
    if height <= width:
        return short, int(short * width / height)
    return int(short * height / width), short


def evaluation_view(image: Image, size: int, spec: ViewSpec) -> Tensor:
    """Shorter side (or both) to floor(size / eval_crop), then the centre, as torchvision has it, [3, size, size]."""
    height, width = evaluation_size(image.shape[0], image.shape[1], size, spec)
    resized = resize(image, (height, width), spec.interpolation)
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
