"""What a recipe says of CLIP and LiT. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from pretrain.objectives.config import ImageTextConfig


class ClipConfig(ImageTextConfig):
    """Images against their captions by a softmax over all pairs of the batch."""

    kind: Literal["clip"]
    initial_scale: float = Field(1 / 0.07, ge=1)  # factor of the cosines, never below 1
    max_scale: float = Field(100.0, ge=1)

    @model_validator(mode="after")
    def _scale(self) -> ClipConfig:
        if self.initial_scale > self.max_scale:
            raise ValueError(f"expected an initial_scale up to max_scale {self.max_scale}, found {self.initial_scale}.")
        return self
