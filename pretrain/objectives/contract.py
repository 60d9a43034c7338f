"""The contract of an objective: a batch and the progress in, an fp32 loss out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from data_pipeline.batch import Batch, BatchSpec
from pretrain.runtime.state import Progress


class LossOutput(NamedTuple):
    """What a forward pass gives back; a tuple, because it is in tuples that ZeRO 3 looks for tensors.

    Attributes:
        loss: fp32 scalar, the mean over the local B; the engine averages over micro-batches and ranks.
        metrics: named fp32 scalars, detached, also means over the local B.
    """

    loss: Tensor
    metrics: dict[str, Tensor] = {}  # noqa: RUF012  (never written to)


class Teacher(NamedTuple):
    """A module without gradients that follows a trained one.

    After each step target <- decay * target + (1 - decay) * online.

    Attributes:
        target: the module that follows.
        online: the module that it follows, with the same parameters in the same order.
        decay: in [0, 1].
    """

    target: nn.Module
    online: nn.Module
    decay: float


class Objective(nn.Module, ABC):
    """Knows neither the engine nor an evaluator, and never calls backward. Inheritance ends one below this.

    Collectives belong to training: in evaluation mode it calls none, as ranks may then have different numbers of
    batches.

    Attributes:
        needs: what a batch must hold; checked against the data before anything starts.
        encoder: the unmodified timm module that evaluation and export receive. A submodule of this name, so
            that its tensors are called `encoder.*` in every checkpoint, whatever the objective.
        coupling: what relates the samples of a batch to each other, so that the loss is no mean over samples and does
            not add up over micro-batches; it is the reason that a refusal of accumulation gives. Empty: nothing does.
    """

    needs: BatchSpec
    encoder: nn.Module
    coupling: str = ""

    @abstractmethod
    def forward(self, batch: Batch, progress: Progress) -> LossOutput:
        """The loss of one micro-batch whose views are already normalized floats, [B, 3, H, W]."""

    def teachers(self, progress: Progress) -> list[Teacher]:
        """The momentum teachers, with their decays of this step; the engine moves them after it."""
        return []

    def bounds(self) -> list[tuple[nn.Parameter, float, float]]:
        """Parameters with the least and greatest value they may have; the engine clamps them after each step."""
        return []

    def constant_lr_modules(self) -> list[nn.Module]:
        """Modules whose learning rate stays at its peak after the warmup, whatever the schedule."""
        return []


@runtime_checkable
class Classifier(Protocol):
    """An objective whose runs can label images, because its head gives each class a probability.

    Attributes:
        num_classes: K.
    """

    num_classes: int

    def classify(self, images: Tensor) -> Tensor:
        """Logits of normalized images [B, 3, S, S], [B, K]."""


class PairFeatures(NamedTuple):
    """What a contrastive loss is made of, all fp32; a tuple, as `LossOutput` is.

    Attributes:
        image: embeddings of unit length, [B, D].
        text: likewise, of the captions in the same order.
        logit_scale: factor of the cosines, a scalar; the exponential is already taken.
        logit_bias: added to the logits, a scalar; zero where the loss has none.
    """

    image: Tensor
    text: Tensor
    logit_scale: Tensor
    logit_bias: Tensor


class Contrastive(Objective):
    """An objective whose loss relates all samples of the batch, so that it does not add up over micro-batches.

    The engine accumulates it exactly, in two passes (Gao et al. 2021, arXiv:2101.06983): the features of the whole
    batch, without gradient; the gradient of the loss with respect to them; then, micro-batch by micro-batch, the
    features once more and that gradient through them. As a term of a sum it is not accumulated.
    """

    coupling = "a term that relates all samples of a batch to each other"

    @abstractmethod
    def features(self, batch: Batch, progress: Progress) -> PairFeatures:
        """Those of one micro-batch; every parameter of the objective acts through them."""

    @abstractmethod
    def loss(self, features: PairFeatures, progress: Progress) -> LossOutput:
        """The loss of the local batch against those of all ranks; a function of the features alone.

        Its mean over ranks is the loss of the global batch.
        """

    def forward(  # type: ignore[override]
        self,
        batch: Batch,
        progress: Progress,
        gradient: PairFeatures | None = None,
        *,
        features_only: bool = False,
    ) -> LossOutput | PairFeatures:
        """The loss, or one of the two passes over a micro-batch, which go this way for ZeRO 3 to see them.

        Args:
            batch: as in `Objective`.
            progress: likewise.
            gradient: of the loss with respect to this micro-batch's features; the "loss" is then
                <features, gradient>, whose gradients are the true loss's.
            features_only: return the features.
        """
        features = PairFeatures(*(_at_least_fp32(value) for value in self.features(batch, progress)))
        if features_only:
            return features
        with torch.autocast(features.image.device.type, enabled=False):
            if gradient is not None:
                return LossOutput(torch.stack([(f * g).sum() for f, g in zip(features, gradient, strict=True)]).sum())
            return self.loss(features, progress)


def _at_least_fp32(value: Tensor) -> Tensor:
    return value if value.dtype == torch.float64 else value.float()
