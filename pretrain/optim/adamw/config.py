"""What a recipe says of AdamW. Imports no torch."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from pretrain.optim.config import Decay, OptimConfig


class AdamW(OptimConfig):
    """Adam with weight decay apart from the gradient (Loshchilov & Hutter 2017, arXiv:1711.05101)."""

    has_fused: ClassVar[bool] = True

    kind: Literal["adamw"] = "adamw"
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.05, ge=0)

    def moments(self) -> tuple[str, ...]:
        """The averages of the gradient and of its square."""
        return "exp_avg", "exp_avg_sq"
