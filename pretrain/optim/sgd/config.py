"""What a recipe says of SGD. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from pretrain.optim.config import Decay, OptimConfig


class Sgd(OptimConfig):
    """Stochastic gradient descent with momentum."""

    kind: Literal["sgd"]
    momentum: Decay = 0.9
    nesterov: bool = False
    weight_decay: float = Field(1e-4, ge=0)  # as an L2 penalty: part of the gradient

    @model_validator(mode="after")
    def _nesterov(self) -> Sgd:
        if self.nesterov and not self.momentum:
            raise ValueError("expected a momentum above 0 with nesterov, found 0.")
        return self

    def moments(self) -> tuple[str, ...]:
        """The velocity, where there is momentum."""
        return ("momentum_buffer",) if self.momentum else ()
