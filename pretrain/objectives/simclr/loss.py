"""The loss of SimCLR (NT-Xent): the other view of an image among all views of the global batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pretrain.objectives.contract import LossOutput
from pretrain.runtime.collectives import gather_rows, rank_and_size, sum_over_ranks


def nt_xent(first: Tensor, second: Tensor, temperature: float, *, across_ranks: bool) -> LossOutput:
    """Chen et al. 2020 (arXiv:2002.05709), Eq. 1, mean over all views: -log of the softmax of cosines / temperature.

    Each of the 2 B views of a rank is compared with all views of all ranks but itself, so that the mean over ranks of
    losses and of gradients is that of the global batch, whatever the number of ranks.

    Args:
        first: projections of one view of each image, [B, D], fp32 or fp64.
        second: projections of the other view, in the same order.
        temperature: divisor of the cosines.
        across_ranks: against the views of all ranks, whose batches have one size; else of the local batch alone.

    Returns:
        The loss, and as `view_to_view` the share of local views whose other view is the nearest of all.
    """
    views = F.normalize(torch.cat([first, second]), dim=1)  # [2 B, D]
    rank, size = rank_and_size() if across_ranks else (0, 1)
    everything: Tensor = _GatherRows.apply(views) if size > 1 else views  # [W 2 B, D]
    own = rank * len(views) + torch.arange(len(views), device=views.device)
    others = own.roll(len(first))  # the second half for the first, and the first for the second
    logits = views @ everything.T / temperature
    logits = logits.scatter(1, own.unsqueeze(1), -torch.inf)
    hits = (logits.detach().argmax(1) == others).float().mean()
    return LossOutput(F.cross_entropy(logits, others), {"view_to_view": hits})


class _GatherRows(torch.autograd.Function):
    """Rows of all ranks; the gradients that all ranks have of a row return to the rank that it is from."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.num_rows = len(rows)
        return gather_rows(rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        rank, _ = rank_and_size()
        return sum_over_ranks(gradients[0].clone())[rank * ctx.num_rows : (rank + 1) * ctx.num_rows]
