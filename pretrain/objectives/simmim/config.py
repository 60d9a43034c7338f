"""What a recipe says of SimMIM. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pretrain.objectives.config import ObjectiveConfig


class SimmimConfig(ObjectiveConfig):
    """The share of the image that is hidden, and in which blocks."""

    kind: Literal["simmim"]
    mask_ratio: float = Field(0.6, gt=0, lt=1)
    mask_patch: int = Field(32, ge=1)  # side of what is hidden at once, pixels; whatever the encoder's patches
