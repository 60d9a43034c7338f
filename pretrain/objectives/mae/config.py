"""What a recipe says of MAE. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from pretrain.objectives.config import ObjectiveConfig


class MaeConfig(ObjectiveConfig):
    """The share of patches that is hidden, and the decoder that predicts them."""

    kind: Literal["mae"]
    mask_ratio: float = Field(0.75, gt=0, lt=1)  # round(ratio * N) of N patches; the authors keep int(N * (1 - ratio))
    decoder_width: int = Field(512, ge=1)
    decoder_depth: int = Field(8, ge=1)
    decoder_heads: int = Field(16, ge=1)
    normalize_target: bool = True

    @model_validator(mode="after")
    def _heads(self) -> MaeConfig:
        if self.decoder_width % self.decoder_heads:
            raise ValueError(
                f"expected a decoder_width that decoder_heads {self.decoder_heads} divides, found {self.decoder_width}."
            )
        return self
