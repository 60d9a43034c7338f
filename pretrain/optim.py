"""AdamW with decay on matrices only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pretrain.recipe import AdamW

_UNDECAYED = ("pos_embed", "cls_token", "reg_token", "dist_token", "mask_token")


def param_groups(module: nn.Module, optim: AdamW) -> list[dict[str, Any]]:
    """Two groups by name, `decay` and `no_decay`: biases, norms, tokens and position embeddings are not decayed."""
    decay: list[nn.Parameter] = []
    no_decay: list[nn.Parameter] = []
    for name, p in module.named_parameters():
        if p.requires_grad:
            exempt = p.ndim < 2 or name.rsplit(".", 1)[-1] in _UNDECAYED
            (no_decay if exempt else decay).append(p)
    groups = [
        {"name": "decay", "params": decay, "weight_decay": optim.weight_decay},
        {"name": "no_decay", "params": no_decay, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(module: nn.Module, optim: AdamW) -> torch.optim.AdamW:
    """torch's own AdamW; the learning rate is set before every step."""
    return torch.optim.AdamW(param_groups(module, optim), lr=0.0, betas=optim.betas, eps=optim.eps)


def empty_state(kept: Tensor) -> dict[str, Tensor]:
    """AdamW's state before the first step, as torch itself creates it, so that there is something to load into."""
    return {
        "step": torch.tensor(0.0),
        "exp_avg": torch.zeros_like(kept),
        "exp_avg_sq": torch.zeros_like(kept),
    }
