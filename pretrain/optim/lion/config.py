"""What a recipe says of Lion. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pretrain.optim.config import Decay, OptimConfig


class Lion(OptimConfig):
    """Each element moves by the learning rate, whatever the size of its gradient.

    The paper (Chen et al. 2023, arXiv:2302.06675, section 5) takes a learning rate 3 to 10 times smaller than AdamW's,
    and a weight decay as many times larger.
    """

    kind: Literal["lion"]
    betas: tuple[Decay, Decay] = (0.9, 0.99)  # of the average that is stepped by, and of the one that is kept
    weight_decay: float = Field(0.5, ge=0)

    def moments(self) -> tuple[str, ...]:
        """The average of the gradient."""
        return ("exp_avg",)
