"""Color jitter, gray, blur and solarize on batches of fp32 images in [0, 1], a parameter per image.

Equal to torchvision's functions on float images but for rounding: nothing is rounded to 8 bits between operations,
as a pipeline over PIL images would. Only operations that are rounded alike wherever an element lies in a batch
are used (no fused multiply-add, sums in integers), so a batch may be cut anywhere without changing a bit.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from pretrain.augment.selected import apply_to_selected, as_column

_GRAY = (0.2989, 0.587, 0.114)  # ITU-R 601-2 luma, to torchvision's digits


def jitter(images: Tensor, order: Tensor, factors: Tensor) -> None:
    """Brightness, contrast, saturation and hue, in the order that each image has; in place.

    Howard 2013 (arXiv:1312.5402) as in SimCLR and BYOL (arXiv:2006.07733, app. B); torchvision's `ColorJitter`.

    Args:
        images: [B, 3, H, W].
        order: [B, 4] on the host: which operation (0..3) comes at each turn, -1: none.
        factors: [B, 4] on the host, of each operation.
    """
    operations = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)
    for turn in order.unbind(1):
        for number, operation in enumerate(operations):
            apply_to_selected(images, turn == number, operation, factors[:, number])


def adjust_brightness(images: Tensor, factors: Tensor) -> Tensor:
    """[n, 3, H, W] times [n], clamped to [0, 1]."""
    return (images * as_column(factors)).clamp_(0, 1)


def adjust_contrast(images: Tensor, factors: Tensor) -> Tensor:
    """Away from, or towards, the mean of the image's gray; [n, 3, H, W], [n]."""
    gray = luma(images)
    units = 2**20  # integers add up to the same in any order
    total = (gray * units).to(torch.int32).sum((1, 2, 3), dtype=torch.int64)
    mean = (total.double() / (units * gray[0].numel())).to(images.dtype)
    return _blend(images, as_column(mean), factors)


def adjust_saturation(images: Tensor, factors: Tensor) -> Tensor:
    """Away from, or towards, the pixel's gray; [n, 3, H, W], [n]."""
    return _blend(images, luma(images), factors)


def adjust_hue(images: Tensor, turns: Tensor) -> Tensor:
    """Rotates the hue of HSV by so many turns; [n, 3, H, W], [n] in [-0.5, 0.5]."""
    red, green, blue = images.unbind(1)
    value = images.amax(1)
    chroma = value - images.amin(1)
    safe = torch.where(chroma == 0, torch.ones_like(chroma), chroma)
    of_blue = (red - green) / safe + 4
    of_green = (blue - red) / safe + 2
    of_red = (green - blue) / safe
    sixths = torch.where(value == red, of_red, torch.where(value == green, of_green, of_blue))
    sixths = sixths + turns.view(-1, 1, 1) * 6
    channels = []
    for n in (5, 3, 1):  # a channel is the value, less the chroma where the hue is far from the channel's own
        k = (sixths + n).remainder_(6)
        channels.append(value - chroma * torch.minimum(k, 4 - k).clamp_(0, 1))
    return torch.stack(channels, 1)


def luma(images: Tensor) -> Tensor:
    """Gray value of each pixel, [n, 3, H, W] -> [n, 1, H, W]."""
    red, green, blue = images.unsqueeze(2).unbind(1)
    return red * _GRAY[0] + green * _GRAY[1] + blue * _GRAY[2]


def grayscale(images: Tensor) -> Tensor:
    """Three equal channels of the pixel's gray, [n, 3, H, W]."""
    return luma(images).expand_as(images)


def solarize(images: Tensor) -> Tensor:
    """Inverts pixels of 0.5 and more (BYOL, arXiv:2006.07733, app. B)."""
    return torch.where(images < 0.5, images, 1 - images)


def blur_radius(size: int) -> int:
    """Taps on each side: those of 23 pixels at 224 (BYOL, app. B), scaled with the image."""
    return min(max(1, size * 23 // 448), size - 1)


def blur_kernels(sigmas: Tensor, radius: int) -> Tensor:
    """Gaussians of these standard deviations, [B] -> [B, 2 radius + 1], each of sum 1.

    In Python's floats: a vectorised exponential would depend on an element's place in the batch.
    """
    return torch.tensor([_gaussian(sigma, radius) for sigma in sigmas.tolist()]).view(-1, 2 * radius + 1)


def _gaussian(sigma: float, radius: int) -> list[float]:
    if sigma == 0:
        return [float(k == 0) for k in range(-radius, radius + 1)]
    weights = [math.exp(-0.5 * (k / sigma) ** 2) for k in range(-radius, radius + 1)]
    total = sum(weights)
    return [weight / total for weight in weights]


def blur(images: Tensor, kernels: Tensor) -> Tensor:
    """Each image along rows and columns with its own kernel, mirrored at the edges.

    Args:
        images: [n, 3, H, W] contiguous, fp32.
        kernels: [n, taps], odd.
    """
    count, channels, height, width = images.shape
    radius = kernels.shape[1] // 2
    weights = kernels.repeat_interleave(channels, 0)
    padded = F.pad(images, [radius] * 4, mode="reflect").view(1, count * channels, *_padded(height, width, radius))
    # One channel a group: a direct sum on CPUs and GPUs alike, in fp32 whatever is allowed to matrix products.
    rows = F.conv2d(padded, weights.view(-1, 1, 1, 2 * radius + 1), groups=count * channels)
    return F.conv2d(rows, weights.view(-1, 1, 2 * radius + 1, 1), groups=count * channels).view_as(images)


def _padded(height: int, width: int, radius: int) -> tuple[int, int]:
    return height + 2 * radius, width + 2 * radius


def _blend(images: Tensor, other: Tensor, factors: Tensor) -> Tensor:
    column = as_column(factors)
    return (images * column).add_(other * (1 - column)).clamp_(0, 1)
