"""Supervised classification: an encoder, a linear head, cross entropy over the classes or a binary one for each."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from data_pipeline.batch import Batch, BatchSpec
from pretrain.objectives.contract import LossOutput, Objective
from pretrain.objectives.supervised.config import SupervisedConfig
from pretrain.runtime.state import Progress


class Supervised(Objective):
    """A linear classifier on an encoder, trained together.

    Args:
        encoder: from images [B, 3, S, S] to features [B, D], D being its `head_hidden_size`.
        image_size: S, pixels.
        config: number of classes K, the loss, and what the head does in training.
    """

    def __init__(self, encoder: nn.Module, image_size: int, config: SupervisedConfig) -> None:
        super().__init__()
        self.encoder = encoder
        self.num_classes = config.num_classes
        self.needs = BatchSpec(image_size, num_classes=config.num_classes)
        self.settings = config
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(int(encoder.head_hidden_size), config.num_classes)  # type: ignore[arg-type]
        nn.init.trunc_normal_(self.head.weight, std=config.classifier_init)
        nn.init.zeros_(self.head.bias)

    def forward(self, batch: Batch, progress: Progress) -> LossOutput:
        """Mean over the local B of each sample's loss, times its weight where the batch has weights.

        The sum is divided by B and not by the sum of the weights, so that the mean over micro-batches and
        ranks is the mean over the global batch. Labels are smoothed whether they are numbers of classes or soft,
        a teacher's too. Metrics: `top1`, and `top5` from 5 classes on, shares in [0, 1], unweighted; of soft labels
        the largest counts.
        """
        if batch.labels is None:
            raise ValueError("batch.labels: expected [B] int64 or [B, K] soft, found none")
        images, settings = batch.views[0], self.settings
        logits = self.head(self.dropout(self.encoder(images))).to(images.dtype)  # fp32 where autocast computed in bf16
        soft = batch.labels.ndim == 2
        labels = batch.labels.to(logits.dtype) if soft else batch.labels
        smoothing = settings.label_smoothing
        if settings.loss == "bce":
            targets = labels if soft else F.one_hot(labels, settings.num_classes).to(logits.dtype)
            losses = binary_cross_entropy(logits, targets, smoothing, settings.target_threshold)
            losses = losses.sum(1) if settings.over_classes == "sum" else losses.mean(1)
        else:
            losses = F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="none")
        if batch.weights is not None:
            losses = losses * batch.weights
        return LossOutput(losses.mean(), _accuracy(logits, labels.argmax(1) if soft else labels))

    def classify(self, images: Tensor) -> Tensor:
        """Logits of the classes, without the dropout of training, [B, K]."""
        logits: Tensor = self.head(self.encoder(images))
        return logits


def binary_cross_entropy(logits: Tensor, targets: Tensor, smoothing: float, threshold: float | None) -> Tensor:
    """A binary cross entropy for each class, over which each image may show several.

    Wightman et al. 2021 (arXiv:2110.00476), section 3.1; smoothing and threshold as timm has them. Cross entropy
    smooths likewise (Szegedy et al. 2015, arXiv:1512.00567, section 7).

    Args:
        logits: [B, K].
        targets: shares of the classes, [B, K], before smoothing.
        smoothing: share of each target that is spread evenly over the K classes.
        threshold: smoothed targets above it become 1, the others 0; None: they stay as they are.

    Returns:
        Of each sample and class, [B, K].
    """
    targets = targets * (1 - smoothing) + smoothing / targets.shape[1]
    if threshold is not None:
        targets = (targets > threshold).to(targets.dtype)
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none")


def _accuracy(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Share of samples whose label is among the k largest logits, fp32 scalars."""
    largest = logits.topk(min(5, logits.shape[1]), dim=1).indices
    hits = (largest == labels.unsqueeze(1)).float()
    accuracy = {"top1": hits[:, 0].mean()}
    if logits.shape[1] >= 5:
        accuracy["top5"] = hits.sum(1).mean()
    return accuracy
