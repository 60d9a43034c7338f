"""torch's SGD."""

from __future__ import annotations

from typing import Any

import torch

from pretrain.optim.sgd.config import Sgd


def build(groups: list[dict[str, Any]], config: Sgd, *, fused: bool) -> torch.optim.SGD:
    """The optimizer; there is no fused form here."""
    return torch.optim.SGD(groups, lr=0.0, momentum=config.momentum, nesterov=config.nesterov)
