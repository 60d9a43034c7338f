"""A contrastive loss over more samples than fit in memory: its gradient with respect to features alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pretrain.objectives.contract import Contrastive, LossOutput, PairFeatures
from pretrain.runtime.state import Progress


@torch.enable_grad()
def loss_and_gradients(
    objective: Contrastive, parts: Sequence[PairFeatures], progress: Progress
) -> tuple[LossOutput, list[PairFeatures]]:
    """The loss of all micro-batches together, and its gradient with respect to the features of each.

    Gao et al. 2021 (arXiv:2101.06983), section 3.2. What all micro-batches share, as the scale of the logits, gets an
    equal part of its gradient in each, so that the parts add up to all of it.

    Args:
        objective: its loss; every rank calls this.
        parts: features of this rank's micro-batches, in their order, without gradient.
        progress: of the step.
    """
    first = parts[0]
    image, text = (torch.cat(column) for column in list(zip(*parts, strict=True))[:2])
    whole = PairFeatures(image, text, first.logit_scale, first.logit_bias)
    leaves = PairFeatures(*(value.detach().requires_grad_() for value in whole))
    output = objective.loss(leaves, progress)
    of_images, of_texts, *shared = torch.autograd.grad(poisoned(output.loss), leaves, materialize_grads=True)
    sizes = [len(part.image) for part in parts]
    rows = zip(torch.split(of_images, sizes), torch.split(of_texts, sizes), strict=True)
    return output, [PairFeatures(*row, *(gradient / len(parts) for gradient in shared)) for row in rows]


def poisoned(loss: Tensor) -> Tensor:
    """A loss that is not finite gets gradients that are not, so that the one check on gradients finds both."""
    return loss * torch.where(torch.isfinite(loss.detach()), 1.0, float("nan"))
