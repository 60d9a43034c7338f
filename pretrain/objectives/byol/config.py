"""What a recipe says of BYOL. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pretrain.objectives.config import ObjectiveConfig


class ByolConfig(ObjectiveConfig):
    """Widths of the heads, and how slowly the target follows."""

    kind: Literal["byol"]
    hidden_width: int = Field(4096, ge=1)  # of projector and predictor
    out_width: int = Field(256, ge=1)
    base_decay: float = Field(0.996, ge=0, lt=1)  # of the target at the start; a half cosine raises it to 1
