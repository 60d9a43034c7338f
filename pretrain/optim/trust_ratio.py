"""What LARS and LAMB share: which parameters' steps are scaled by their norms."""

from __future__ import annotations

import torch


def adapt_what_is_decayed(optimizer: torch.optim.Optimizer) -> None:
    """Parameters that may be decayed are adapted, even where weight_decay is 0; the others are not."""
    for group in optimizer.param_groups:
        group["always_adapt"] = not group["name"].endswith("no_decay")
