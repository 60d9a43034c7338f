"""SigLIP's loss, block by block: the matrix of all pairs, 4 GB at a batch of 32,768, is never held."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pretrain.objectives.contract import LossOutput, PairFeatures
from pretrain.runtime.collectives import gather_rows, rank_and_size, sum_over_ranks

BLOCK = 2048  # images, and texts, of a block: 17 MB in fp32


def sigmoid_loss(features: PairFeatures, *, across_ranks: bool, block: int = BLOCK) -> LossOutput:
    """-1/B sum_ij log sigmoid(z_ij (t x_i . y_j + b)), where z is 1 for an image and its own text, else -1.

    Zhai et al. 2023 (arXiv:2303.15343), section 3.2; in blocks as in section 3.3, whatever the number of ranks.
    A rank computes the rows of its own images against the texts of all ranks and divides by its own number of images,
    so that the mean over ranks of losses and of gradients is that of the global batch.

    Args:
        features: of the local batch.
        across_ranks: against the texts of all ranks, whose batches have one size; else of the local batch alone.
        block: images, and texts, whose logits are held at a time; of no influence but rounding.
    """
    value, hits = _SigmoidLoss.apply(*features, across_ranks, block)
    metrics = {
        "image_to_text": hits,
        "logit_scale": features.logit_scale.detach(),
        "logit_bias": features.logit_bias.detach(),
    }
    return LossOutput(value, metrics)


class _SigmoidLoss(torch.autograd.Function):
    """Computes gradients beside the loss, as a block's logits are gone afterwards; they are [B, D] at most."""

    @staticmethod
    def forward(
        ctx: Any, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, across_ranks: bool, block: int
    ) -> tuple[Tensor, Tensor]:
        rank, size = rank_and_size() if across_ranks else (0, 1)
        texts = gather_rows(text) if size > 1 else text
        first = rank * len(image)  # of the texts that belong to the local images
        grads = _Sums(image, texts, any(ctx.needs_input_grad[:4]))
        hits = image.new_zeros((), dtype=torch.int64)
        for start in range(0, len(image), block):
            rows = slice(start, start + block)
            matching = torch.arange(first + start, first + start + len(image[rows]), device=image.device)
            hits += grads.add_rows(rows, matching, scale, bias, block)
        ctx.size, ctx.own = size, slice(first, first + len(image))
        ctx.save_for_backward(*grads.gradients(scale, bias))
        found = hits.to(image.dtype) / len(image)
        ctx.mark_non_differentiable(found)
        return (grads.loss / len(image)).to(image.dtype), found

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        image, texts, scale, bias = (gradient * outputs[0] for gradient in ctx.saved_tensors)
        if ctx.size > 1:
            texts = sum_over_ranks(texts)[ctx.own]  # every rank had a loss in which these texts took part
        return image, texts, scale, bias, None, None


class _Sums:
    """The loss of some rows of the matrix after others, times B, and its gradients; sums of scalars in fp64."""

    def __init__(self, image: Tensor, texts: Tensor, with_gradients: bool) -> None:
        self.image, self.texts, self._with_gradients = image, texts, with_gradients
        self.loss, self._scale, self._bias = image.new_zeros(3, dtype=torch.float64).unbind()
        self._image, self._texts = (torch.zeros_like(t) if with_gradients else t.new_zeros(0) for t in (image, texts))

    def add_rows(self, rows: slice, matching: Tensor, scale: Tensor, bias: Tensor, block: int) -> Tensor:
        """Adds some images against all texts; returns how many have their own text as the nearest of all.

        Args:
            rows: the images.
            matching: index of each one's own text, [R].
        """
        image = self.image[rows]
        own = (image * self.texts[matching]).sum(1)  # cosines
        nearest = torch.full_like(own, -torch.inf)
        for start in range(0, len(self.texts), block):
            columns = slice(start, start + block)
            text = self.texts[columns]
            cosines = image @ text.T
            here = ((matching >= start) & (matching < start + len(text))).nonzero().flatten()
            at = (here, matching[here] - start)
            logits = scale * cosines + bias
            losses = F.softplus(logits)
            losses[at] = F.softplus(-logits[at])
            self.loss = self.loss + losses.sum(dtype=torch.float64)
            if self._with_gradients:
                gradient = logits.sigmoid_()  # with respect to the logits
                gradient[at] -= 1
                self._bias = self._bias + gradient.sum(dtype=torch.float64)
                self._scale = self._scale + (gradient * cosines).sum(dtype=torch.float64)
                gradient *= scale
                self._image[rows] += gradient @ text
                self._texts[columns] += gradient.T @ image
            cosines[at] = -torch.inf
            nearest = torch.maximum(nearest, cosines.amax(1))
        return (own > nearest).sum()

    def gradients(self, scale: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The gradients with respect to local images, all texts, scale and bias, of the loss divided by B."""
        size = len(self.image)
        self._image /= size
        self._texts /= size
        return self._image, self._texts, (self._scale / size).to(scale.dtype), (self._bias / size).to(bias.dtype)
