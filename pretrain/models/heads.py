"""Projection and prediction heads: linear layers, batch norm and ReLU between them; thrown away after pretraining."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from torch import nn


def batch_norm_head(widths: Sequence[int], *, last: Literal["linear", "biased", "normed"]) -> nn.Sequential:
    """Linear layers from [B, widths[0]] to [B, widths[-1]], batch norm and ReLU behind each but the last.

    A layer that batch norm follows has no bias, as the mean would take it out again.

    Args:
        widths: of the input, of what lies between, of the output; at least two.
        last: the last layer is linear without a bias (BYOL's heads, as in its authors' code), linear with one
            (SimSiam's predictor), or followed by batch norm without scale and shift (SimSiam's projector).
    """
    *hidden, (in_width, out_width) = pairwise(widths)
    layers: list[nn.Module] = []
    for before, after in hidden:
        layers += [nn.Linear(before, after, bias=False), nn.BatchNorm1d(after), nn.ReLU(inplace=True)]
    layers.append(nn.Linear(in_width, out_width, bias=last == "biased"))
    if last == "normed":
        layers.append(nn.BatchNorm1d(out_width, affine=False))
    return nn.Sequential(*layers)
