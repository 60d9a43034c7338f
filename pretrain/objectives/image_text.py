"""Images against their captions: two towers, and a loss that relates all pairs of the batch (clip.py, siglip.py)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Self

import torch
from open_clip.transformer import TextTransformer, VisionTransformer
from timm.models import group_parameters
from torch import nn

from data_pipeline.batch import Batch, BatchSpec
from data_pipeline.errors import InputError
from pretrain.models.config import ModelConfig
from pretrain.models.towers import Parts, build_parts, embed_images, embed_tokens, tokens_of
from pretrain.objectives.clip.loss import clip_loss
from pretrain.objectives.config import Clip, Siglip
from pretrain.objectives.contract import Contrastive, Features, LossOutput
from pretrain.objectives.siglip.loss import sigmoid_loss
from pretrain.runtime.state import Progress


class ImageText(Contrastive):
    """CLIP (Radford et al. 2021, arXiv:2103.00020) or SigLIP (Zhai et al. 2023, arXiv:2303.15343).

    With a locked image tower it is LiT (Zhai et al. 2021, arXiv:2111.07991): what is locked takes no gradient, and
    stays in evaluation mode. In evaluation mode pairs are those of the local batch alone, as ranks then have batches
    of different sizes.

    Args:
        model: of the recipe; a timm encoder, or both towers of open_clip.
        config: loss, its scale, and which towers are locked.

    Raises:
        InputError: towers that cannot be built, or locked in part.
    """

    def __init__(self, model: ModelConfig, config: Clip | Siglip) -> None:
        super().__init__()
        parts = build_parts(model, config.embed_dim, config.text)
        self.encoder, self.projection, self.text = parts
        self.needs = BatchSpec(model.image_size, tokens=tokens_of(model, parts, config.tokenizer))
        # Of one dimension, as DeepSpeed cannot broadcast what has none.
        self.logit_scale = nn.Parameter(torch.tensor([math.log(config.initial_scale)]))
        self.max_scale = math.inf
        if isinstance(config, Siglip):
            self.logit_bias = nn.Parameter(torch.tensor([config.initial_bias]))
        else:
            self.max_scale = config.max_scale
        self._sigmoid = isinstance(config, Siglip)
        _lock(self.encoder, config.lock_image, "objective.lock_image")
        _lock(self.text, config.lock_text, "objective.lock_text")
        locked = [m for tower in (self.encoder, self.text) for m in tower.modules() if _is_locked(m)]
        self._locked = list(dict.fromkeys(child for module in locked for child in module.modules()))

    def features(self, batch: Batch, progress: Progress) -> Features:
        images, tokens = batch.views[0], batch.tokens
        if tokens is None:
            raise ValueError("batch.tokens: expected [B, L] int64, found none")
        parts = Parts(self.encoder, self.projection, self.text)
        return Features(
            embed_images(parts, images),
            embed_tokens(parts, tokens, images.dtype),
            self.logit_scale.exp().squeeze(),
            self.logit_bias.squeeze() if self._sigmoid else self.logit_scale.new_zeros(()),
        )

    def loss(self, features: Features, progress: Progress) -> LossOutput:
        """Metrics: `image_to_text` (and, of CLIP, `text_to_image`), the share of local images whose caption is the
        nearest of all; `logit_scale` and, of SigLIP, `logit_bias`."""
        compute = sigmoid_loss if self._sigmoid else clip_loss
        return compute(features, across_ranks=self.training)

    def bounds(self) -> list[tuple[nn.Parameter, float, float]]:
        """The factor of CLIP's cosines stays between 1 and `max_scale`, as in open_clip."""
        return [] if self._sigmoid else [(self.logit_scale, 0.0, math.log(self.max_scale))]

    def train(self, mode: bool = True) -> Self:
        """Parts without a trainable parameter stay in evaluation mode: their running statistics, their dropout."""
        super().train(mode)
        for module in self._locked:
            module.training = False
        return self


def _is_locked(module: nn.Module) -> bool:
    """Whether it has parameters, none of which is trained."""
    trained = [p.requires_grad for p in module.parameters()]
    return bool(trained) and not any(trained)


def _lock(tower: nn.Module, locked: bool | int, where: str) -> None:
    """Freezes a tower; a number leaves so many of its last groups of layers as they are.

    The groups are open_clip's: stem, blocks (the last norm with the last of them), projection; or timm's.
    """
    if locked is False:
        return
    names = _groups(tower)
    if locked is True:
        tower.requires_grad_(False)
        return
    if names is None or locked >= len(names):
        raise InputError(
            where=where,
            expected="true, or false" if names is None else f"fewer than its {len(names)} groups of layers, or false",
            found=f"{locked} to leave unlocked of {type(tower).__name__}",
        )
    tower.requires_grad_(False)
    for group in names[-locked:]:
        for name in group:
            tower.get_parameter(name).requires_grad_(True)


def _groups(tower: nn.Module) -> list[list[str]] | None:
    """Names of a tower's parameters, from its stem on; None where it does not say what its layers are."""
    if isinstance(tower, VisionTransformer | TextTransformer):
        return _groups_of_blocks(tower, len(tower.transformer.resblocks))
    matcher = getattr(tower, "group_matcher", None)
    if matcher is None:
        return None
    groups: dict[int, Sequence[str]] = group_parameters(tower, matcher())
    return [list(groups[key]) for key in sorted(groups)]


def _groups_of_blocks(tower: nn.Module, num_blocks: int) -> list[list[str]]:
    """As `lock` of open_clip's towers has them."""
    groups: list[list[str]] = [[] for _ in range(num_blocks + 2)]
    for name, _ in tower.named_parameters():
        if name.startswith("transformer.resblocks."):
            groups[1 + int(name.split(".")[2])].append(name)
        elif name.startswith(("ln_post.", "ln_final.", "attn_pool.")):
            groups[num_blocks].append(name)
        elif name == "proj" or name.startswith("text_projection"):
            groups[num_blocks + 1].append(name)
        else:
            groups[0].append(name)
    return groups
