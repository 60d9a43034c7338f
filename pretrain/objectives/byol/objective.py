"""BYOL: predict, from one view, what a slowly moving copy of the network makes of the other."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict

import torch
from torch import Tensor, nn

from data_pipeline.batch import Batch, BatchSpec
from pretrain.models.heads import batch_norm_head
from pretrain.objectives.byol.config import ByolConfig
from pretrain.objectives.contract import LossOutput, Objective, Teacher
from pretrain.objectives.siamese import embedding_std, negative_cosine
from pretrain.runtime.state import Progress


class Byol(Objective):
    """Grill et al. 2020 (arXiv:2006.07733).

    Online: encoder, projector, predictor. Target: encoder and projector, copies that start equal, get no gradient and
    follow the online weights (`teachers`). Batch norm in the target takes the statistics of its batch, as in training,
    and keeps running ones of its own. Views go through the networks one after the other, as in the authors' code: batch
    norm sees one of them at a time.

    Args:
        encoder: from images [B, 3, S, S] to features [B, F], F being its `head_hidden_size`.
        image_size: S, pixels.
        config: widths of projector and predictor, and the target's decay at the start.
    """

    def __init__(self, encoder: nn.Module, image_size: int, config: ByolConfig) -> None:
        super().__init__()
        width, hidden, out = int(encoder.head_hidden_size), config.hidden_width, config.out_width  # type: ignore[arg-type]
        self.needs = BatchSpec(image_size, num_views=2)
        self.base_decay = config.base_decay
        self.encoder = encoder
        self.projector = batch_norm_head([width, hidden, out], last="linear")
        self.predictor = batch_norm_head([out, hidden, out], last="linear")
        followed = OrderedDict(encoder=encoder, projector=self.projector)
        self.target = nn.Sequential(copy.deepcopy(followed)).requires_grad_(False)

    def forward(self, batch: Batch, progress: Progress) -> LossOutput:
        """Squared distance of unit vectors (Eq. 2), summed over both orders of the views; mean over the local B.

        Metrics: `embedding_std` of the first view's online projections.
        """
        first, second = batch.views
        projection = self._projection(first)
        predictions = self._prediction(projection, first), self._prediction(self._projection(second), second)
        with torch.no_grad():
            targets = [self.target(view).to(view.dtype) for view in (first, second)]
        cosines = negative_cosine(predictions[0], targets[1]) + negative_cosine(predictions[1], targets[0])
        return LossOutput(4 + 2 * cosines, {"embedding_std": embedding_std(projection, across_ranks=self.training)})

    def teachers(self, progress: Progress) -> list[Teacher]:
        """The target\'s encoder and projector.

        After step k of K, counted from 0, their decay is tau = 1 - (1 - tau0) (cos(pi k / K) + 1) / 2.
        """
        share = min(1.0, progress.fraction)
        decay = 1 - (1 - self.base_decay) * (math.cos(math.pi * share) + 1) / 2
        target_encoder, target_projector = self.target
        return [Teacher(target_encoder, self.encoder, decay), Teacher(target_projector, self.projector, decay)]

    def _projection(self, view: Tensor) -> Tensor:
        projection: Tensor = self.projector(self.encoder(view))
        return projection

    def _prediction(self, projection: Tensor, view: Tensor) -> Tensor:
        prediction: Tensor = self.predictor(projection)
        return prediction.to(view.dtype)  # fp32 where autocast computed in bf16
