"""BYOL and SimSiam written sample by sample and value by value: what the objectives are held to.

The encoder is naive.py's ViT. Weights come by name out of the objective's state; nothing else is shared with it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.objectives.naive import Shape, Weights, encode

Rows = list[Tensor]


def byol_loss(w: Weights, first: Tensor, second: Tensor, shape: Shape) -> Tensor:
    """|p1/|p1| - z2'/|z2'||^2 + |p2/|p2| - z1'/|z1'||^2, mean over samples; z' is what the target makes."""
    total = torch.zeros((), dtype=first.dtype)
    for shown, predicted in ((first, second), (second, first)):
        predictions = head(w, "predictor", head(w, "projector", features(w, "", shown, shape)))
        targets = head(w, "target.projector", features(w, "target.", predicted, shape))
        for prediction, target in zip(predictions, targets, strict=True):
            total = total + sum((p - t) ** 2 for p, t in zip(unit(prediction), unit(target), strict=True))
    return total / len(first)


def simsiam_loss(w: Weights, first: Tensor, second: Tensor, shape: Shape, layers: int) -> Tensor:
    """-1/2 (cos(p1, z2) + cos(p2, z1)), mean over samples; z is a constant."""
    total = torch.zeros((), dtype=first.dtype)
    constant = {name: value.detach() for name, value in w.items()}
    for shown, predicted in ((first, second), (second, first)):
        projected = head(w, "projector", features(w, "", shown, shape), layers, norm_last=True)
        predictions = head(w, "predictor", projected)
        targets = head(constant, "projector", features(constant, "", predicted, shape), layers, norm_last=True)
        for prediction, target in zip(predictions, targets, strict=True):
            cosine = sum(p * t for p, t in zip(unit(prediction), unit(target), strict=True))
            total = total - cosine / 2
    return total / len(first)


def features(w: Weights, prefix: str, images: Tensor, shape: Shape) -> Rows:
    """Means of the patch tokens of each image, by the encoder whose weights' names begin with `prefix`."""
    own = {name.removeprefix(prefix): value for name, value in w.items() if name.startswith(f"{prefix}encoder.")}
    found = []
    for image in images:
        tokens = encode(own, image, list(range(shape.grid**2)), shape)
        found.append(sum(tokens[1:], tokens[0]) / len(tokens))
    return found


def head(w: Weights, name: str, rows: Rows, layers: int = 2, norm_last: bool = False) -> Rows:
    """Linear, batch norm, ReLU, as often as there are layers; but behind the last no ReLU, and no norm unless asked.

    Modules are numbered as they follow each other: 0, 1 (and 2, which has no weights) of the first layer, 3, 4, ...
    """
    for layer in range(layers):
        at, last = 3 * layer, layer == layers - 1
        weight, bias = w[f"{name}.{at}.weight"], w.get(f"{name}.{at}.bias")
        rows = [torch.stack([sum(weight[o] * row) for o in range(len(weight))]) for row in rows]  # type: ignore[arg-type]
        if bias is not None:
            rows = [row + bias for row in rows]
        if not last:
            scale, shift = w[f"{name}.{at + 1}.weight"], w[f"{name}.{at + 1}.bias"]
            rows = [torch.where(row > 0, row, 0 * row) for row in normed(rows, scale, shift)]
        elif norm_last:
            rows = normed(rows, torch.ones_like(rows[0]), torch.zeros_like(rows[0]))
    return rows


def normed(rows: Rows, scale: Tensor, shift: Tensor) -> Rows:
    """By mean and variance of each column over these rows, the variance divided by their number."""
    columns = []
    for column in zip(*(list(row) for row in rows), strict=True):
        mean = sum(column) / len(column)
        variance = sum((value - mean) ** 2 for value in column) / len(column)
        columns.append([(value - mean) / (variance + 1e-5) ** 0.5 for value in column])
    return [torch.stack(values) * scale + shift for values in (list(row) for row in zip(*columns, strict=True))]


def unit(row: Sequence[Tensor] | Tensor) -> Rows:
    length = sum(value**2 for value in row) ** 0.5  # type: ignore[operator]
    return [value / length for value in row]
