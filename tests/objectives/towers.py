"""Small towers and captioned batches for tests."""

from __future__ import annotations

from typing import Any

import torch

from data_pipeline.batch import Batch
from pretrain.models.config import ImageTower, Model, OpenClip, TextTower
from pretrain.objectives.clip.config import ClipConfig
from pretrain.objectives.image_text import ImageText
from pretrain.objectives.kinds import build_objective
from pretrain.objectives.siglip.config import SiglipConfig

TEXT = TextTower(width=16, heads=2, layers=2, context_length=6)
OPEN_CLIP = OpenClip(
    library="open_clip",
    name="tiny",
    image_size=16,
    embed_dim=8,
    image=ImageTower(width=16, layers=2, heads=2, patch_size=8),
    text=TEXT,
)
TIMM = Model(
    name="vit_tiny_patch16_224",
    image_size=16,
    patch_size=4,
    options={"embed_dim": 16, "depth": 2, "num_heads": 2, "class_token": False, "global_pool": "avg", "fc_norm": False},
)
BESIDE_TIMM: dict[str, Any] = {"embed_dim": 8, "text": TEXT}
END = 49407  # of text, in CLIP's tokenizer


def config(kind: str, **options: Any) -> ClipConfig | SiglipConfig:
    return ClipConfig(kind="clip", **options) if kind == "clip" else SiglipConfig(kind="siglip", **options)


def make(kind: str, *, timm: bool = False, seed: int = 0, **options: Any) -> ImageText:
    torch.manual_seed(seed)
    beside = BESIDE_TIMM if timm else {}
    objective = build_objective(TIMM if timm else OPEN_CLIP, config(kind, **beside, **options))
    assert isinstance(objective, ImageText)
    return objective


def captioned(size: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Batch:
    """Tokens as CLIP's tokenizer makes them: the end of text, which is the highest, at different places; then zeros."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 1000, (size, 6), generator=generator)
    ends = torch.randint(2, 6, (size, 1), generator=generator)
    at = torch.arange(6)
    tokens = torch.where(at < ends, tokens, torch.where(at == ends, END, 0))
    images = torch.randn(size, 3, 16, 16, generator=generator, dtype=dtype)
    return Batch(tuple(map(str, range(size))), (images,), tokens=tokens)
