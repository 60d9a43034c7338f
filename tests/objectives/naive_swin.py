"""A Swin written token by token in Python loops, after Liu et al. 2021 (arXiv:2103.14030), and SimMIM over it.

Weights come by name out of the objective's state; nothing else is shared with it, nor with timm.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tests.objectives.naive import Weights, layer_norm, linear, mlp

EPS = 1e-5
Grid = dict[tuple[int, int], Tensor]  # a token by its row and column


@dataclass(frozen=True)
class Shape:
    """Of a square image of `grid` x `grid` patches; blocks and heads by stage."""

    grid: int
    patch: int
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    window: int

    @property
    def stride(self) -> int:
        return self.patch * 2 ** (len(self.depths) - 1)


def simmim_loss(w: Weights, images: Tensor, masks: Tensor, shape: Shape, block: int) -> Tensor:
    """Mean absolute error over samples and hidden pixels; masks of blocks of `block` pixels, [B, G * G]."""
    errors = []
    size = shape.grid * shape.patch
    for image, mask in zip(images, masks, strict=True):
        hidden = {(y, x) for y in range(size) for x in range(size) if mask[y // block * (size // block) + x // block]}
        predicted = {at: linear(w, "head", token) for at, token in encode(w, image, hidden, shape).items()}
        for y, x in hidden:
            (row, dy), (column, dx) = divmod(y, shape.stride), divmod(x, shape.stride)
            for c in range(3):
                value = predicted[row, column][(c * shape.stride + dy) * shape.stride + dx]
                errors.append(abs(value - image[c, y, x]))
    return sum(errors) / len(errors)  # type: ignore[return-value]


def encode(w: Weights, image: Tensor, hidden: set[tuple[int, int]], shape: Shape) -> Grid:
    """The last stage's tokens after the last norm; the patch of a hidden pixel is the mask token."""
    grid = {(r, c): embed(w, image, r, c, hidden, shape.patch) for r in range(shape.grid) for c in range(shape.grid)}
    side = shape.grid
    for stage, depth in enumerate(shape.depths):
        if stage:
            side //= 2
            grid = {(r, c): merged(w, stage, grid, r, c) for r in range(side) for c in range(side)}
        for i in range(depth):
            window = min(shape.window, side)
            shift = window // 2 if i % 2 and window < side else 0
            name = f"encoder.layers.{stage}.blocks.{i}"
            normed = {at: layer_norm(w, f"{name}.norm1", token, EPS) for at, token in grid.items()}
            mixed = attention(w, f"{name}.attn", normed, side, window, shift, shape.heads[stage])
            grid = {at: token + mixed[at] for at, token in grid.items()}
            grid = {
                at: token + mlp(w, f"{name}.mlp", layer_norm(w, f"{name}.norm2", token, EPS))
                for at, token in grid.items()
            }
    return {at: layer_norm(w, "encoder.norm", token, EPS) for at, token in grid.items()}


def embed(w: Weights, image: Tensor, r: int, c: int, hidden: set[tuple[int, int]], patch: int) -> Tensor:
    if (r * patch, c * patch) in hidden:
        return w["mask_token"]
    values = image[:, r * patch : (r + 1) * patch, c * patch : (c + 1) * patch].flatten()
    return layer_norm(w, "encoder.patch_embed.norm", linear(w, "encoder.patch_embed.proj", values), EPS)


def merged(w: Weights, stage: int, grid: Grid, r: int, c: int) -> Tensor:
    """Four neighbours as one token, down before across."""
    four = torch.cat([grid[2 * r + dr, 2 * c + dc] for dc in (0, 1) for dr in (0, 1)])
    rows = w[f"encoder.layers.{stage}.downsample.reduction.weight"]
    normed = layer_norm(w, f"encoder.layers.{stage}.downsample.norm", four, EPS)
    return torch.stack([(row * normed).sum() for row in rows])


def attention(w: Weights, name: str, grid: Grid, side: int, window: int, shift: int, heads: int) -> Grid:
    """Each token over those of its window; a shifted window that wraps around the image is cut at its border."""
    width = len(next(iter(grid.values())))
    size = width // heads
    table = w[f"{name}.relative_position_bias_table"]
    projected = {at: linear(w, f"{name}.qkv", token) for at, token in grid.items()}

    def place(at: int) -> tuple[int, int, bool]:
        """Window, position in it, and whether it came there around the border."""
        moved = (at - shift) % side
        return moved // window, moved % window, at < shift

    out = {}
    for r, c in grid:
        (row, y, above), (column, x, left) = place(r), place(c)
        parts = []
        for h in range(heads):
            query = projected[r, c][h * size : (h + 1) * size]
            total, normalizer = torch.zeros(size, dtype=query.dtype), torch.zeros((), dtype=query.dtype)
            for other_r, other_c in grid:
                (other_row, other_y, other_above), (other_column, other_x, other_left) = place(other_r), place(other_c)
                if (row, above, column, left) != (other_row, other_above, other_column, other_left):
                    continue
                key = projected[other_r, other_c][width + h * size : width + (h + 1) * size]
                value = projected[other_r, other_c][2 * width + h * size : 2 * width + (h + 1) * size]
                bias = table[(y - other_y + window - 1) * (2 * window - 1) + x - other_x + window - 1, h]
                weight = torch.exp((query * key).sum() / size**0.5 + bias)
                total, normalizer = total + weight * value, normalizer + weight
            parts.append(total / normalizer)
        out[r, c] = linear(w, f"{name}.proj", torch.cat(parts))
    return out
