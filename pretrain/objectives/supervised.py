"""Supervised classification: an encoder, a linear head, cross entropy."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from data_pipeline.batch import Batch, BatchSpec
from pretrain import recipe_objective
from pretrain.objectives.base import LossOutput, Objective
from pretrain.state import Progress


class Supervised(Objective):
    """Cross entropy with label smoothing (Szegedy et al. 2015, arXiv:1512.00567, section 7).

    Args:
        encoder: from images [B, 3, S, S] to features [B, D], D being its `head_hidden_size`.
        image_size: S, pixels.
        config: number of classes K and label smoothing.
    """

    def __init__(self, encoder: nn.Module, image_size: int, config: recipe_objective.Supervised) -> None:
        super().__init__()
        self.encoder = encoder
        self.needs = BatchSpec(image_size, num_classes=config.num_classes)
        self.label_smoothing = config.label_smoothing
        self.head = nn.Linear(int(encoder.head_hidden_size), config.num_classes)  # type: ignore[arg-type]
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, batch: Batch, progress: Progress) -> LossOutput:
        """Mean over the local B of each sample's cross entropy, times its weight where the batch has weights.

        The sum is divided by B and not by the sum of the weights, so that the mean over micro-batches and
        ranks is the mean over the global batch. Metrics: `top1`, and `top5` from 5 classes on, shares in
        [0, 1], unweighted; of soft labels the largest counts.
        """
        if batch.labels is None:
            raise ValueError("batch.labels: expected [B] int64 or [B, K] soft, found none")
        images = batch.views[0]
        logits = self.head(self.encoder(images)).to(images.dtype)  # fp32 where autocast computed in bf16
        soft = batch.labels.ndim == 2
        labels = batch.labels.to(logits.dtype) if soft else batch.labels
        losses = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing, reduction="none")
        if batch.weights is not None:
            losses = losses * batch.weights
        return LossOutput(losses.mean(), _accuracy(logits, labels.argmax(1) if soft else labels))


def _accuracy(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Share of samples whose label is among the k largest logits, fp32 scalars."""
    largest = logits.topk(min(5, logits.shape[1]), dim=1).indices
    hits = (largest == labels.unsqueeze(1)).float()
    accuracy = {"top1": hits[:, 0].mean()}
    if logits.shape[1] >= 5:
        accuracy["top5"] = hits.sum(1).mean()
    return accuracy
