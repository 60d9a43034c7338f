"""What a recipe says of SigLIP. Imports no torch."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from pretrain.objectives.config import ImageTextConfig


class SiglipConfig(ImageTextConfig):
    """Images against their captions by a sigmoid for each pair."""

    has_bias: ClassVar[bool] = True

    kind: Literal["siglip"]
    initial_scale: float = Field(10.0, gt=0)
    initial_bias: float = -10.0
