"""Random erasing of normalized images: a box of noise, or of the mean color."""

from __future__ import annotations

from functools import cache
from statistics import NormalDist

import torch
from torch import Tensor

from pretrain.augment.selected import as_column, inside

_NOISE_BITS = 12
_GOLDEN, _FIRST, _SECOND = (  # of SplitMix64 (data_pipeline/order/keyed.py), as signed 64-bit numbers
    word - 2**64 for word in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)


def erase(images: Tensor, boxes: Tensor, seeds: Tensor | None = None) -> Tensor:
    """Normal noise in each image's box, or 0, which is the mean color of normalized images.

    Zhong et al. 2017 (arXiv:1708.04896); timm's modes `pixel` and `const`.

    Args:
        images: [n, 3, H, W], normalized.
        boxes: [n, 4] top, left, height, width.
        seeds: [n] int64, of the noise; None: no noise.
    """
    fill = torch.zeros_like(images) if seeds is None else noise(seeds, images[0].shape).to(images.dtype)
    return torch.where(inside(boxes, *images.shape[2:]), fill, images)


def noise(seeds: Tensor, shape: torch.Size) -> Tensor:
    """Standard normal numbers, [n, *shape] fp32, from each seed alone, the same on every device.

    Each of 4,096 equally likely quantiles stands for its whole stretch of the distribution: a table needs no
    logarithm or cosine, whose last bits differ between machines.
    """
    counters = torch.ones(shape, dtype=torch.int64, device=seeds.device).flatten().cumsum(0).view(1, *shape)
    words = _mix(as_column(seeds) + counters * _GOLDEN)
    table = torch.tensor(_quantiles(), device=seeds.device)
    return table[words & (2**_NOISE_BITS - 1)]


def _mix(z: Tensor) -> Tensor:
    """The output function of SplitMix64 on signed words, whose shift would bring in the sign."""
    z = (z ^ _shifted(z, 30)) * _FIRST
    z = (z ^ _shifted(z, 27)) * _SECOND
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, bits: int) -> Tensor:
    return torch.bitwise_right_shift(z, bits).bitwise_and_(2 ** (64 - bits) - 1)


@cache
def _quantiles() -> tuple[float, ...]:
    count = 2**_NOISE_BITS
    return tuple(NormalDist().inv_cdf((i + 0.5) / count) for i in range(count))
