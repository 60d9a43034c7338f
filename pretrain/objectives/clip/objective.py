"""CLIP: each image's caption among all captions, and each caption's image among all images."""

from __future__ import annotations

import math

from torch import nn

from pretrain.models.config import ModelConfig
from pretrain.objectives.clip.config import ClipConfig
from pretrain.objectives.clip.loss import clip_loss
from pretrain.objectives.contract import LossOutput, PairFeatures
from pretrain.objectives.image_text import ImageText
from pretrain.runtime.state import Progress


class Clip(ImageText):
    """Radford et al. 2021 (arXiv:2103.00020); with a locked image tower LiT.

    Args:
        model: of the recipe; a timm encoder, or both towers of open_clip.
        config: the towers, which of them are locked, and the factor of the cosines with its limit.
    """

    def __init__(self, model: ModelConfig, config: ClipConfig) -> None:
        super().__init__(model, config, initial_scale=config.initial_scale)
        self.max_scale = config.max_scale

    def loss(self, features: PairFeatures, progress: Progress) -> LossOutput:
        """Metrics: `image_to_text` and `text_to_image`, the share of local images whose caption is the nearest of all
        and the other way round; `logit_scale`."""
        return clip_loss(features, across_ranks=self.training)

    def bounds(self) -> list[tuple[nn.Parameter, float, float]]:
        """The factor of the cosines stays between 1 and `max_scale`, as in open_clip."""
        return [(self.logit_scale, 0.0, math.log(self.max_scale))]
