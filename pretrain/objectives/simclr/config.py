"""What a recipe says of SimCLR. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pretrain.objectives.config import ObjectiveConfig


class SimClrConfig(ObjectiveConfig):
    """The projection head, and the temperature of the softmax over the views of the batch."""

    kind: Literal["simclr"]
    projector_layers: int = Field(2, ge=1)
    hidden_width: int = Field(2048, ge=1)  # of the projector
    out_width: int = Field(128, ge=1)
    temperature: float = Field(0.1, gt=0)
