"""What a recipe says of LARS. Imports no torch."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from pretrain.optim.config import Decay, OptimConfig


class Lars(OptimConfig):
    """Each parameter's step is scaled by its norm (You et al. 2017, arXiv:1708.03888).

    What is not decayed is not adapted either, as in BYOL.
    """

    update: ClassVar[Literal["elementwise", "norm per tensor"]] = "norm per tensor"

    kind: Literal["lars"]
    momentum: Decay = 0.9
    eta: float = Field(1e-3, gt=0)  # of the trust ratio
    weight_decay: float = Field(1.5e-6, ge=0)  # as an L2 penalty

    def moments(self) -> tuple[str, ...]:
        """The velocity, where there is momentum."""
        return ("momentum_buffer",) if self.momentum else ()
