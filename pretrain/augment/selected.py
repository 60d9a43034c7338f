"""An operation on some samples of a batch, chosen on the host, so that the device is never asked."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def apply_to_selected(images: Tensor, chosen: Tensor, change: Callable[..., Tensor], *parameters: Tensor) -> None:
    """Puts `change(images[chosen], *parameters[chosen])` in the place of the chosen images; others are not touched.

    Args:
        images: [B, ...], written to.
        chosen: [B] bool, on the host.
        change: from [n, ...] and parameters of n rows to [n, ...]; what it makes of a row depends on that row alone,
            or, where rows are chosen by pairs, on the pair.
        parameters: each [B, ...], on the host; they arrive on the device.
    """
    rows = chosen.nonzero().flatten()
    if rows.numel() == 0:
        return
    moved = [parameter[rows].to(images.device, non_blocking=True) for parameter in parameters]
    rows = rows.to(images.device, non_blocking=True)
    images.index_copy_(0, rows, change(images.index_select(0, rows), *moved))


def as_column(values: Tensor) -> Tensor:
    """[n] -> [n, 1, 1, 1], to go with images."""
    return values.view(-1, 1, 1, 1)


def inside(boxes: Tensor, height: int, width: int) -> Tensor:
    """Whether a pixel lies in its image's box (top, left, height, width), [n, 4] -> [n, 1, height, width] bool."""
    top, left, box_height, box_width = (as_column(column) for column in boxes.unbind(1))
    y = _indices(height, boxes).view(1, 1, -1, 1)
    x = _indices(width, boxes).view(1, 1, 1, -1)
    return (y >= top) & (y < top + box_height) & (x >= left) & (x < left + box_width)


def _indices(count: int, like: Tensor) -> Tensor:
    return like.new_ones(count).cumsum(0) - 1
