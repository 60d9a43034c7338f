"""Images against their captions: two towers under a loss that relates all pairs of the batch."""

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
from pretrain.models.towers import TowerModules, build_parts, embed_images, embed_tokens, token_spec
from pretrain.objectives.config import ImageTextConfig
from pretrain.objectives.contract import Contrastive, PairFeatures
from pretrain.runtime.state import Progress


class ImageText(Contrastive):
    """What CLIP and SigLIP share: an image tower, a text tower, and a learned factor of their cosines.

    With a locked image tower it is LiT (Zhai et al. 2021, arXiv:2111.07991): what is locked takes no gradient, and
    stays in evaluation mode. In evaluation mode pairs are those of the local batch alone, as ranks then have batches
    of different sizes.

    Args:
        model: of the recipe; a timm encoder, or both towers of open_clip.
        config: what the towers are with a timm encoder, and which of them are locked.
        initial_scale: of the cosines.
        initial_bias: of the logits, learned too; None: they have none.

    Raises:
        InputError: towers that cannot be built, or locked in part.
    """

    logit_bias: nn.Parameter | None

    def __init__(
        self, model: ModelConfig, config: ImageTextConfig, *, initial_scale: float, initial_bias: float | None = None
    ) -> None:
        super().__init__()
        parts = build_parts(model, config.embed_dim, config.text)
        self.encoder, self.projection, self.text = parts
        self.needs = BatchSpec(model.image_size, tokens=token_spec(model, parts, config.tokenizer))
        # Of one dimension, as DeepSpeed cannot broadcast what has none.
        self.logit_scale = nn.Parameter(torch.tensor([math.log(initial_scale)]))
        bias = None if initial_bias is None else nn.Parameter(torch.tensor([initial_bias]))
        self.register_parameter("logit_bias", bias)
        _lock(self.encoder, config.lock_image, "objective.lock_image")
        _lock(self.text, config.lock_text, "objective.lock_text")
        locked = [m for tower in (self.encoder, self.text) for m in tower.modules() if _is_locked(m)]
        self._locked = list(dict.fromkeys(child for module in locked for child in module.modules()))

    def features(self, batch: Batch, progress: Progress) -> PairFeatures:
        """Embeddings of images and captions, with the factor and the bias of their logits."""
        images, tokens = batch.views[0], batch.tokens
        if tokens is None:
            raise ValueError("batch.tokens: expected [B, L] int64, found none")
        parts = TowerModules(self.encoder, self.projection, self.text)
        return PairFeatures(
            embed_images(parts, images),
            embed_tokens(parts, tokens, images.dtype),
            self.logit_scale.exp().squeeze(),
            self.logit_scale.new_zeros(()) if self.logit_bias is None else self.logit_bias.squeeze(),
        )

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
