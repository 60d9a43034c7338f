"""SigLIP: for each pair of an image and a caption of the batch, whether they belong together."""

from __future__ import annotations

from pretrain.models.config import ModelConfig
from pretrain.objectives.contract import LossOutput, PairFeatures
from pretrain.objectives.image_text import ImageText
from pretrain.objectives.siglip.config import SiglipConfig
from pretrain.objectives.siglip.loss import sigmoid_loss
from pretrain.runtime.state import Progress


class Siglip(ImageText):
    """Zhai et al. 2023 (arXiv:2303.15343).

    Args:
        model: of the recipe; a timm encoder, or both towers of open_clip.
        config: the towers, which of them are locked, and the factor and bias of the logits at the start.
    """

    def __init__(self, model: ModelConfig, config: SiglipConfig) -> None:
        super().__init__(model, config, initial_scale=config.initial_scale, initial_bias=config.initial_bias)

    def loss(self, features: PairFeatures, progress: Progress) -> LossOutput:
        """Metrics: `image_to_text`, the share of local images whose caption is the nearest of all; `logit_scale` and
        `logit_bias`."""
        return sigmoid_loss(features, across_ranks=self.training)
