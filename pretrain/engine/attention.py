"""Which of timm's two attentions is the faster on a device; both compute the same."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn


def choose_attention(
    module: nn.Module,
    device: torch.device,
    precision: Literal["fp32", "bf16"],
    sdpa: Literal["auto", "on", "off"] = "auto",
) -> None:
    """Sets `fused_attn` of every attention in `module`: torch's scaled_dot_product_attention, or plain products.

    With "auto", torch's wins everywhere but in bf16 on a CPU, where its backward takes two to six times as long as
    plain matrix products (17 to 785 tokens, one core, torch 2.15): half the step of a small ViT.
    """
    fused = sdpa == "on" or (sdpa == "auto" and (precision == "fp32" or device.type != "cpu"))
    attention: Any
    for attention in module.modules():
        if hasattr(attention, "fused_attn"):
            attention.fused_attn = fused
