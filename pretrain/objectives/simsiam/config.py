"""What a recipe says of SimSiam. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pretrain.objectives.config import ObjectiveConfig


class SimSiamConfig(ObjectiveConfig):
    """Layers and widths of the heads, and the predictor's learning rate."""

    kind: Literal["simsiam"]
    projector_layers: int = Field(3, ge=1)
    projector_width: int = Field(2048, ge=1)  # of every layer, the last too
    predictor_width: int = Field(512, ge=1)  # of the hidden layer
    fixed_predictor_lr: bool = True  # the predictor's learning rate stays at its peak
