"""SimSiam: predict, from one view, what the same network makes of the other; no gradient through what is predicted."""

from __future__ import annotations

from torch import nn

from data_pipeline.batch import Batch, BatchSpec
from pretrain.models.heads import batch_norm_head
from pretrain.objectives.contract import LossOutput, Objective
from pretrain.objectives.siamese import embedding_std, negative_cosine
from pretrain.objectives.simsiam.config import SimSiamConfig
from pretrain.runtime.state import Progress


class SimSiam(Objective):
    """Chen & He 2020 (arXiv:2011.10566), Eq. 4.

    Views go through the network one after the other, as in the authors' code: batch norm sees one of them at a time.

    Args:
        encoder: from images [B, 3, S, S] to features [B, F], F being its `head_hidden_size`.
        image_size: S, pixels.
        config: layers and widths of projector and predictor; whether the predictor's learning rate decays.
    """

    def __init__(self, encoder: nn.Module, image_size: int, config: SimSiamConfig) -> None:
        super().__init__()
        out = config.projector_width
        self.needs = BatchSpec(image_size, num_views=2)
        self.fixed_predictor_lr = config.fixed_predictor_lr
        self.encoder = encoder
        widths = [int(encoder.head_hidden_size), *[out] * config.projector_layers]  # type: ignore[arg-type]
        self.projector = batch_norm_head(widths, last="normed")
        self.predictor = batch_norm_head([out, config.predictor_width, out], last="biased")

    def forward(self, batch: Batch, progress: Progress) -> LossOutput:
        """Negative cosine similarity, mean over both orders of the views and over the local B; in [-1, 1].

        Metrics: `embedding_std` of the first view's projections.
        """
        dtype = batch.views[0].dtype  # fp32 where autocast computes in bf16
        first, second = (self.projector(self.encoder(view)) for view in batch.views)
        predictions = self.predictor(first).to(dtype), self.predictor(second).to(dtype)
        cosines = negative_cosine(predictions[0], second.to(dtype)) + negative_cosine(predictions[1], first.to(dtype))
        return LossOutput(cosines / 2, {"embedding_std": embedding_std(first, across_ranks=self.training)})

    def constant_lr_modules(self) -> list[nn.Module]:
        """The predictor, which should follow the latest representations (section 4.2)."""
        return [self.predictor] if self.fixed_predictor_lr else []
