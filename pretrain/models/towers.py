"""An image tower and a text tower with one embedding space: as they are trained, and as an evaluator receives them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from open_clip.model import CLIPTextCfg, _build_text_tower
from torch import Tensor, nn
from torch.nn import functional as F

from data_pipeline.batch import TokenSpec
from data_pipeline.errors import InputError
from data_pipeline.samples.captions import Tokenizer
from data_pipeline.samples.preprocessing import Preprocessing
from pretrain.models.config import Model, ModelConfig, TextTower
from pretrain.models.encoders import build_encoder
from pretrain.models.folders import weights_sha256
from pretrain.models.open_clip_models import build_open_clip, cleaning, model_config, text_config

CLIP_SCALE = math.log(1 / 0.07)
SIGLIP_SCALE, SIGLIP_BIAS = math.log(10), -10.0


class TowerModules(NamedTuple):
    """What two towers have in common. Embeddings are not normalized.

    Attributes:
        encoder: the image tower, an unmodified timm or open_clip module, from images [B, 3, S, S] to [B, E].
        projection: [B, E] -> [B, D]; the identity with open_clip's image tower, which ends in one.
        text: open_clip's text tower, from tokens [B, L] to [B, D].
    """

    encoder: nn.Module
    projection: nn.Module
    text: nn.Module

    @property
    def context_length(self) -> int:
        return int(self.text.context_length)  # type: ignore[arg-type]

    @property
    def vocab_size(self) -> int:
        return int(self.text.vocab_size)  # type: ignore[arg-type]


def build_parts(model: ModelConfig, embed_dim: int | None, text: TextTower | None) -> TowerModules:
    """Both towers of a recipe, on the CPU, initialized from torch's global seed.

    Args:
        model: a timm encoder, which gets a linear projection (without bias, as open_clip has it) and a text tower
            beside it; or both towers of open_clip.
        embed_dim: D; None with open_clip, whose towers have their own.
        text: the text tower; likewise.

    Raises:
        InputError: towers that cannot be built, or that are given twice or not at all.
    """
    given = {"objective.embed_dim": embed_dim, "objective.text": text}
    if isinstance(model, Model):
        for where, value in given.items():
            if value is None:
                raise InputError(where, "a value, as the model is a timm encoder, without a text tower", "none")
        assert embed_dim is not None
        assert text is not None
        encoder = build_encoder(model)
        width = int(encoder.head_hidden_size)  # type: ignore[arg-type]
        return TowerModules(encoder, nn.Linear(width, embed_dim, bias=False), build_text(embed_dim, text_config(text)))
    for where, value in given.items():
        if value is not None:
            raise InputError(where, "none, as the model has both towers (model.library open_clip)", "one")
    both = build_open_clip(model_config(model))
    return TowerModules(both.visual, nn.Identity(), both.text)  # type: ignore[arg-type]


def token_spec(model: ModelConfig, parts: TowerModules, tokenizer: str) -> TokenSpec:
    """What the text tower of a recipe needs of captions."""
    clean = "whitespace" if isinstance(model, Model) else cleaning(model_config(model)["text_cfg"])
    return TokenSpec(tokenizer, parts.context_length, parts.vocab_size, clean)


def build_text(embed_dim: int, config: Mapping[str, Any]) -> nn.Module:
    """open_clip's text tower alone, of a `text_cfg`."""
    tower: nn.Module = _build_text_tower(embed_dim, CLIPTextCfg(**config))
    return tower


def embed_images(parts: TowerModules, images: Tensor) -> Tensor:
    """Unit vectors [B, D] of normalized images [B, 3, S, S], in the images' precision whatever autocast computed in."""
    return F.normalize(parts.projection(parts.encoder(images)).to(images.dtype), dim=-1)


def embed_tokens(parts: TowerModules, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """Unit vectors [B, D] of tokens [B, L], in `dtype`."""
    return F.normalize(parts.text(tokens).to(dtype), dim=-1)


class TwoTowers(nn.Module):
    """What a trained objective's state is loaded into: its names are the objective's.

    Args:
        parts: the towers.
        has_bias: whether the logits have one (SigLIP).
    """

    def __init__(self, parts: TowerModules, *, has_bias: bool) -> None:
        super().__init__()
        self.encoder, self.projection, self.text = parts
        self.logit_scale = nn.Parameter(torch.tensor([SIGLIP_SCALE if has_bias else CLIP_SCALE]))  # log of the factor
        if has_bias:
            self.logit_bias = nn.Parameter(torch.tensor([SIGLIP_BIAS]))

    @property
    def parts(self) -> TowerModules:
        return TowerModules(self.encoder, self.projection, self.text)


@dataclass(frozen=True)
class Towers:
    """Two frozen towers, and the preprocessing that belongs to them.

    Attributes:
        module: the weights; evaluation mode is the caller's to set (`evaluating`).
        tokenizer: text -> tokens [L].
        preprocessing: how images become the input of the image tower, S x S pixels.
        tag: short name among the towers of one run, for file names: encoder, step_00001000, random.
        description: where they come from, for a report.
        run: the run's folder, where there is one; results are kept there.
        notes: what a reader of every report on them should know.
    """

    module: TwoTowers
    tokenizer: Tokenizer
    preprocessing: Preprocessing
    tag: str
    description: Mapping[str, object] = field(default_factory=dict)
    run: Path | None = None
    notes: tuple[str, ...] = ()

    def encode_image(self, images: Tensor) -> Tensor:
        """Unit vectors [B, D], fp32, of normalized images [B, 3, S, S] on the towers' device."""
        return embed_images(self.module.parts, images)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Unit vectors [B, D], fp32, of tokens [B, L] on the towers' device."""
        return embed_tokens(self.module.parts, tokens, torch.float32)

    def tokenize(self, texts: list[str]) -> Tensor:
        """[B, L] int64, on the CPU."""
        return torch.stack([self.tokenizer(text) for text in texts])

    @property
    def logit_scale(self) -> float:
        """The factor of the cosines; the exponential is taken."""
        return float(self.module.logit_scale.exp())

    @property
    def logit_bias(self) -> float:
        """Added to the logits; 0 where the loss has none."""
        return float(getattr(self.module, "logit_bias", 0.0))

    @property
    def device(self) -> torch.device:
        return self.module.logit_scale.device

    def described_preprocessing(self) -> dict[str, object]:
        """The preprocessing of images and captions as a report has it."""
        return {
            **self.preprocessing.described(),
            "tokenizer": self.tokenizer.name,
            "context_length": self.tokenizer.context_length,
        }

    def weights_sha256(self) -> str:
        return weights_sha256(self.module)
