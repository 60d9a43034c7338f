"""What objectives on two views without negatives share: the similarity they raise, and a measure of their collapse."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from pretrain.runtime.collectives import sum_over_ranks


def negative_cosine(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean negative cosine similarity of paired rows, -<p/|p|, z/|z|>.

    Chen & He 2020 (arXiv:2011.10566), Eq. 1, with the stop-gradient of Eq. 3. The squared distance of the same unit
    vectors (Grill et al. 2020, arXiv:2006.07733, Eq. 2) is 2 + 2 times it.

    Args:
        prediction: predictor output p, [B, D]; gradients flow.
        target: projector output z, [B, D]; detached here, so that a caller cannot forget it.

    Returns:
        Scalar in [-1, 1] of their type, mean over the local B; the engine averages over ranks.

    Raises:
        ValueError: the shapes differ; the message shows both.
    """
    if prediction.shape != target.shape:
        raise ValueError(f"expected paired rows, found {tuple(prediction.shape)} and {tuple(target.shape)}")
    return -(F.normalize(prediction, dim=1) * F.normalize(target.detach(), dim=1)).sum(1).mean()


@torch.no_grad()
def embedding_std(embeddings: Tensor, *, across_ranks: bool) -> Tensor:
    """How far unit vectors are spread: 1 where they lie evenly around the origin, 0 where all are the same.

    The standard deviation of each dimension of z/|z| over the batch, its mean over dimensions, times sqrt(D)
    (Chen & He 2020, arXiv:2011.10566, section 4.1).

    Args:
        embeddings: z, [B, D].
        across_ranks: over the global batch, a collective; else over the local one.

    Returns:
        fp32 scalar.
    """
    unit = F.normalize(embeddings.double(), dim=1)
    count = torch.full_like(unit[0], len(unit))
    moments = torch.stack([unit.sum(0), unit.square().sum(0), count])
    sums, squares, count = (sum_over_ranks(moments) if across_ranks else moments).unbind()
    variance = squares / count - (sums / count).square()
    std: Tensor = variance.clamp(min=0).sqrt().mean() * unit.shape[1] ** 0.5
    return std.float()
