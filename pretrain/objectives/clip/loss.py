"""CLIP's loss: each image's caption among all captions, and each caption's image among all images."""

from __future__ import annotations

import warnings

import torch
from open_clip.loss import ClipLoss
from torch import Tensor
from torch.nn import functional as F

from pretrain.objectives.contract import LossOutput, PairFeatures
from pretrain.runtime.collectives import rank_and_size

# open_clip gathers by a function that torch has deprecated, which would be said at every step.
warnings.filterwarnings("ignore", message=r"torch\.distributed\.nn\.functional\.all_gather", category=FutureWarning)


def clip_loss(features: PairFeatures, *, across_ranks: bool) -> LossOutput:
    """Radford et al. 2021 (arXiv:2103.00020), Figure 3: the mean of the cross entropies over rows and over columns.

    Logits are open_clip's: each rank has the rows of its own samples only, and gradients return to where features
    came from, so that the mean over ranks of losses and of gradients is that of the global batch.

    Args:
        features: of the local batch.
        across_ranks: against those of all ranks, whose batches have one size; else of the local batch alone.
    """
    rank, size = rank_and_size() if across_ranks else (0, 1)
    loss = ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=size)
    per_image, per_text = loss.get_logits(features.image, features.text, features.logit_scale)
    targets = loss.get_ground_truth(per_image.device, len(per_image))
    value = (F.cross_entropy(per_image, targets) + F.cross_entropy(per_text, targets)) / 2
    metrics = {
        "image_to_text": _accuracy(per_image, targets),
        "text_to_image": _accuracy(per_text, targets),
        "logit_scale": features.logit_scale.detach(),
    }
    return LossOutput(value, metrics)


@torch.no_grad()
def _accuracy(logits: Tensor, targets: Tensor) -> Tensor:
    return (logits.argmax(1) == targets).float().mean()
