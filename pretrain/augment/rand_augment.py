"""RandAugment on batches of uint8 images: the operation and its argument are each image's own.

Pillow is the definition, as it is timm's: color operations agree to the last bit, geometry within one level. The
choices were made on the host (data_pipeline/samples/rand_augment.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from data_pipeline.samples.rand_augment import RandOp
from pretrain.augment.selected import apply_to_selected, as_column


def rand_augment(images: Tensor, operations: Tensor, arguments: Tensor, fill: Sequence[float]) -> None:
    """Applies each image's operations, layer by layer; in place.

    Args:
        images: [B, 3, H, W] uint8.
        operations: [B, L] on the host, `RandOp` or -1 for none.
        arguments: [B, L] on the host.
        fill: color in [0, 1] of what geometry brings in from outside.
    """
    for numbers, values in zip(operations.unbind(1), arguments.unbind(1), strict=True):
        for operation in RandOp:
            chosen = numbers == int(operation)
            if operation not in _GEOMETRY:
                apply_to_selected(images, chosen, _COLOR[operation], values)
            elif chosen.any():
                matrices = _matrices(operation, values, *images.shape[2:])
                apply_to_selected(images, chosen, partial(warp, fill=fill), matrices)


def auto_contrast(images: Tensor, _: Tensor) -> Tensor:
    """Stretches each channel to the whole range."""
    present = _histogram(images) > 0
    levels = torch.arange(256, device=images.device)
    low = torch.where(present, levels, 255).amin(-1, keepdim=True).double()
    high = torch.where(present, levels, 0).amax(-1, keepdim=True).double()
    scale = torch.full_like(low, 255) / (high - low).clamp(min=1)  # `255 / x` would round twice
    table = (levels * scale + -low * scale).trunc().clamp(0, 255)
    return _look_up(images, torch.where(high > low, table, levels.double()))


def equalize(images: Tensor, _: Tensor) -> Tensor:
    """Flattens the histogram of each channel."""
    counts = _histogram(images)
    levels = torch.arange(256, device=images.device)
    last = torch.where(counts > 0, levels, 0).amax(-1, keepdim=True)
    step = (counts.sum(-1, keepdim=True) - counts.gather(-1, last)) // 255
    below = counts.cumsum(-1) - counts
    table = ((step // 2 + below) // step.clamp(min=1)).clamp(max=255)
    return _look_up(images, torch.where(step > 0, table, levels))


def invert(images: Tensor, _: Tensor) -> Tensor:
    return 255 - images


def posterize(images: Tensor, bits: Tensor) -> Tensor:
    """Keeps the highest bits, 0 to 8."""
    dropped = 2 ** (8 - as_column(bits).to(torch.int32))
    return (images // dropped * dropped).to(torch.uint8)


def solarize(images: Tensor, thresholds: Tensor) -> Tensor:
    """Inverts pixels from a threshold on."""
    return torch.where(images < as_column(thresholds), images, 255 - images)


def solarize_add(images: Tensor, levels: Tensor) -> Tensor:
    """Brightens pixels below 128."""
    brighter = (images + as_column(levels).to(torch.int32)).clamp_(max=255).to(torch.uint8)
    return torch.where(images < 128, brighter, images)


def brightness(images: Tensor, factors: Tensor) -> Tensor:
    return blend(images, torch.zeros_like(images), factors)


def contrast(images: Tensor, factors: Tensor) -> Tensor:
    return blend(images, mean_luma(images), factors)


def color(images: Tensor, factors: Tensor) -> Tensor:
    return blend(images, luma(images), factors)


def sharpness(images: Tensor, factors: Tensor) -> Tensor:
    return blend(images, smooth(images), factors)


def luma(images: Tensor) -> Tensor:
    """Pillow's gray, [n, 3, H, W] -> [n, 1, H, W], in its fixed-point arithmetic."""
    red, green, blue = images.to(torch.int32).unsqueeze(2).unbind(1)
    return (red * 19595 + green * 38470 + blue * 7471 + 2**15).bitwise_right_shift(16)


def mean_luma(images: Tensor) -> Tensor:
    """[n, 1, 1, 1], rounded half up."""
    count = images.shape[2] * images.shape[3]
    return (2 * luma(images).sum((1, 2, 3), keepdim=True) + count) // (2 * count)


def smooth(images: Tensor) -> Tensor:
    """Pillow's SMOOTH filter: (5 x the pixel + its 8 neighbors) / 13, rounded; the outermost pixels as they are."""
    height, width = images.shape[2:]
    if min(height, width) < 3:
        return images
    pixels = images.to(torch.int32)
    columns = pixels[..., :-2, :] + pixels[..., 1:-1, :] + pixels[..., 2:, :]
    total = columns[..., :-2] + columns[..., 1:-1] + columns[..., 2:] + 4 * pixels[..., 1:-1, 1:-1]
    pixels[..., 1:-1, 1:-1] = (2 * total + 13) // 26
    return pixels


def blend(images: Tensor, other: Tensor, factors: Tensor) -> Tensor:
    """other + factor * (image - other), cut to whole levels in [0, 255], as Pillow's `Image.blend`."""
    other = other.float()
    return ((images - other).mul_(as_column(factors)) + other).clamp_(0, 255).to(torch.uint8)


def warp(images: Tensor, matrices: Tensor, fill: Sequence[float]) -> Tensor:
    """Affine with bilinear sampling, as Pillow's `Image.transform`; timm also takes bicubic for half of its samples.

    Args:
        images: [n, 3, H, W] uint8.
        matrices: [n, 6] a, b, c, d, e, f: the pixel centered at (x, y) comes from (ax + by + c, dx + ey + f).
        fill: color of what comes from outside the image.
    """
    height, width = images.shape[2:]
    a, b, c, d, e, f = (column.view(-1, 1, 1) for column in matrices.unbind(1))
    x = (torch.arange(width, device=images.device) + 0.5).view(1, 1, -1)
    y = (torch.arange(height, device=images.device) + 0.5).view(1, -1, 1)
    from_x, from_y = a * x + b * y + c, d * x + e * y + f
    outside = (from_x < 0) | (from_x >= width) | (from_y < 0) | (from_y >= height)
    grid = torch.stack([from_x * (2 / width) - 1, from_y * (2 / height) - 1], -1)
    found = F.grid_sample(images.float(), grid, "bilinear", "border", align_corners=False)
    found = found.add_(_SLACK).clamp_(0, 255).to(torch.uint8)
    color = torch.tensor([round(255 * share) for share in fill], dtype=torch.uint8, device=images.device)
    return torch.where(outside.unsqueeze(1), color.view(1, 3, 1, 1), found)


def _matrices(operation: RandOp, values: Tensor, height: int, width: int) -> Tensor:
    return torch.tensor([_matrix(operation, value, height, width) for value in values.tolist()])


def _matrix(operation: RandOp, value: float, height: int, width: int) -> tuple[float, ...]:
    match operation:
        case RandOp.SHEAR_X:
            return 1, value, 0, 0, 1, 0
        case RandOp.SHEAR_Y:
            return 1, 0, 0, value, 1, 0
        case RandOp.TRANSLATE_X:
            return 1, 0, value * width, 0, 1, 0
        case RandOp.TRANSLATE_Y:
            return 1, 0, 0, 0, 1, value * height
        case _:
            cos, sin = math.cos(math.radians(value)), math.sin(math.radians(-value))
            x, y = width / 2, height / 2
            return cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y


def _look_up(images: Tensor, table: Tensor) -> Tensor:
    """Each channel through its table, [n, 3, 256]."""
    found = table.to(torch.uint8).gather(-1, images.flatten(2).long())
    return found.view_as(images)


def _histogram(images: Tensor) -> Tensor:
    """How often each level occurs in each channel, [n, 3, 256] int64."""
    levels = images.flatten(2).long()
    counts = torch.zeros(*levels.shape[:2], 256, dtype=torch.int64, device=images.device)
    return counts.scatter_add_(-1, levels, torch.ones_like(levels))


_SLACK = 2**-8  # of a level: Pillow cuts off fractions, and fp32 may fall a little short of a whole one
_GEOMETRY = {RandOp.ROTATE, RandOp.SHEAR_X, RandOp.SHEAR_Y, RandOp.TRANSLATE_X, RandOp.TRANSLATE_Y}
_COLOR: dict[RandOp, Callable[[Tensor, Tensor], Tensor]] = {
    RandOp.AUTO_CONTRAST: auto_contrast,
    RandOp.EQUALIZE: equalize,
    RandOp.INVERT: invert,
    RandOp.POSTERIZE: posterize,
    RandOp.SOLARIZE: solarize,
    RandOp.SOLARIZE_ADD: solarize_add,
    RandOp.COLOR: color,
    RandOp.CONTRAST: contrast,
    RandOp.BRIGHTNESS: brightness,
    RandOp.SHARPNESS: sharpness,
}
