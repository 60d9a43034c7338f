"""Optimizers over named parameter groups, and their state as it is before the first step."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from timm.models._manipulate import group_with_matcher
from torch import Tensor, nn

from data_pipeline.errors import InputError
from pretrain.objectives.contract import Objective
from pretrain.optim.config import OptimConfig

CONSTANT_LR = "undecayed_"  # what names of groups begin with whose learning rate stays at its peak; checkpoints hold it
_EXEMPT = {
    "pos_embed",
    "cls_token",
    "reg_token",
    "dist_token",
    "mask_token",
    "relative_position_bias_table",
    "cpb_mlp",
    "logit_scale",
}  # where they are a part of a parameter's name; the last three are Swin's
_HEAD = "head"  # no parameter's own name: those of objectives have a part of the module before a dot


def param_groups(module: nn.Module, optim: OptimConfig) -> list[dict[str, Any]]:
    """Groups by name: `decay` and `no_decay`, with layer decay one such pair per layer (`layer_3_decay`).

    Biases, norms, tokens and positions, Swin's relative ones too, are not decayed; those of open_clip's towers are, as
    in the training of its release 3.3. With layer decay (BEiT, Bao et al. 2021, arXiv:2106.08254; MAE's fine-tuning)
    the learning rate of layer l of L is scaled by layer_decay ** (L - l): layers are timm's, stem first; L is the head,
    with a norm of pooled features where there is one, while a norm of tokens goes with the last block. Modules that the
    objective names as `constant_lr_modules` have such groups of their own (`undecayed_decay`), whose learning rate
    stays at its peak.

    Raises:
        InputError: layer decay for an encoder that does not say what its layers are.
    """
    layers = _layers(module) if optim.layer_decay < 1 else {}
    top = layers.pop(_HEAD, 0)
    fixed = (
        {p for m in module.constant_lr_modules() for p in m.parameters()} if isinstance(module, Objective) else set()
    )
    groups: dict[tuple[bool, int, bool], dict[str, Any]] = {}
    for name, p in module.named_parameters():
        if not p.requires_grad:
            continue
        exempt = p.ndim < 2 or not _EXEMPT.isdisjoint(name.split("."))
        layer = layers.get(name, top)
        title = "no_decay" if exempt else "decay"
        title = f"layer_{layer}_{title}" if layers else title
        group = groups.setdefault(
            (p in fixed, layer, exempt),
            {
                "name": f"{CONSTANT_LR}{title}" if p in fixed else title,
                "params": [],
                "weight_decay": 0.0 if exempt else optim.weight_decay,
                "lr_scale": optim.layer_decay ** (top - layer),
            },
        )
        group["params"].append(p)
    return [groups[key] for key in sorted(groups)]


def build_optimizer(module: nn.Module, optim: OptimConfig, *, fused: bool = False) -> torch.optim.Optimizer:
    """The optimizer of the recipe's kind; the learning rate is set before every step.

    Each parameter group holds the recipe's group as `config`, beside the optimizer's own hyperparameters.

    Args:
        module: whose trainable parameters are stepped.
        optim: kind and hyperparameters; `clip_norm` is the engine's to apply.
        fused: the form in one kernel, of a kind that has one.
    """
    optimizer: torch.optim.Optimizer = _module(optim.kind).build(param_groups(module, optim), optim, fused=fused)
    for group in optimizer.param_groups:
        group["config"] = optim
    return optimizer


def empty_state(group: dict[str, Any], kept: Tensor) -> dict[str, Tensor]:
    """The state of a stepped tensor before the first step, so that there is something to load into.

    It has the keys, shapes and devices that the optimizer itself would create; a step from it is the step from none.
    """
    config: OptimConfig = group["config"]
    counter = getattr(_module(config.kind), "step_counter", None)
    steps: dict[str, Tensor] = counter(group, kept) if counter is not None else {}
    return steps | {name: torch.zeros_like(kept) for name in config.moments()}


def _module(kind: str) -> ModuleType:
    """The module of a kind of the table.

    It has `build`, and `step_counter` where the state of each tensor holds the number of its steps.
    """
    return import_module(f"pretrain.optim.{kind}.optimizer")


def step_counters(optimizer: torch.optim.Optimizer, group: dict[str, Any], kept: list[Tensor]) -> list[Tensor]:
    """The scalars that count a group's applied steps: AdamW has one per stepped tensor, LAMB one, others none."""
    counters = [group, *(optimizer.state[tensor] for tensor in kept)]
    return [holder["step"] for holder in counters if "step" in holder]


def _layers(module: nn.Module) -> dict[str, int]:
    """Layer of each parameter of the encoder, the stem being 0; under `_HEAD`, that of whatever is not the encoder's.

    timm puts what it does not know by name, such as the norm of pooled features, on top, and with it the head.
    """
    encoder: Any = getattr(module, "encoder", None)
    matcher = getattr(encoder, "group_matcher", None)
    if matcher is None:
        raise InputError(
            where="optim.layer_decay", expected="1, as this encoder does not say what its layers are", found="less"
        )
    named = [*encoder.named_parameters(), ("head", None)]
    layers: dict[str, int] = group_with_matcher(named, matcher(), reverse=True)
    return {(_HEAD if name == "head" else f"encoder.{name}"): layer for name, layer in layers.items()}
