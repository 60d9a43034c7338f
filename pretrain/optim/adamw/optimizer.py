"""torch's AdamW."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pretrain.optim.adamw.config import AdamW


def build(groups: list[dict[str, Any]], config: AdamW, *, fused: bool) -> torch.optim.AdamW:
    """The optimizer; fused: in one kernel."""
    # Not False: that would also switch off torch's choice of the multi-tensor form.
    return torch.optim.AdamW(groups, lr=0.0, betas=config.betas, eps=config.eps, fused=fused or None)


def step_counter(group: dict[str, Any], kept: Tensor) -> dict[str, Tensor]:
    """It counts the steps of each tensor, on the device where its form needs the count."""
    return {"step": torch.zeros((), dtype=torch.float32, device=kept.device if group["fused"] else "cpu")}
