"""What a recipe says of LAMB. Imports no torch."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from pretrain.optim.config import Decay, OptimConfig


class Lamb(OptimConfig):
    """Adam, each parameter's step of which is scaled by its norm (You et al. 2019, arXiv:1904.00962).

    What is not decayed is not adapted either.
    """

    update: ClassVar[Literal["elementwise", "norm per tensor"]] = "norm per tensor"

    kind: Literal["lamb"]
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    eps: float = Field(1e-6, gt=0)
    weight_decay: float = Field(0.02, ge=0)

    def moments(self) -> tuple[str, ...]:
        """The averages of the gradient and of its square."""
        return "exp_avg", "exp_avg_sq"
