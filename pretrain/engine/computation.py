"""How the same mathematics is computed: TF32, recomputed blocks, compiled blocks, memory formats."""

from __future__ import annotations

from dataclasses import replace

import torch

from data_pipeline.batch import Batch
from data_pipeline.errors import InputError
from pretrain.engine.activation_checkpointing import checkpoint_activations
from pretrain.models.blocks import repeated_blocks
from pretrain.objectives.contract import Objective
from pretrain.recipe.recipe import EngineConfig


def choose_computation(objective: Objective, config: EngineConfig, device: torch.device) -> None:
    """Sets up an objective as the recipe's engine says; its results stay what they are, up to rounding.

    Raises:
        InputError: activations are to be checkpointed, or blocks compiled, and the objective has no blocks.
    """
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = config.tf32
        torch.backends.cudnn.allow_tf32 = config.tf32
    if config.activation_checkpointing == "none" and not config.compile:
        return
    # Of a teacher nothing is kept for a backward pass anyway.
    blocks = [b for b in repeated_blocks(objective).values() if any(p.requires_grad for p in b.parameters())]
    if not blocks:
        raise InputError(
            where="engine.compile" if config.compile else "engine.activation_checkpointing",
            expected="a model with repeated blocks, which are taken one by one",
            found=f"{type(objective.encoder).__name__} without any",
            fix="Leave the option out.",
        )
    if config.activation_checkpointing == "blocks":
        dtype = torch.bfloat16 if config.settled_precision == "bf16" else None
        checkpoint_activations(blocks, device=device, dtype=dtype, offload=config.offload_activations)
    if config.compile:
        for block in blocks:
            block.compile()


def channels_last(batch: Batch) -> Batch:
    """The batch with images in the memory format that convolutions then take from them.

    Weights keep one layout, which checkpoints rely on.
    """
    return replace(batch, views=tuple(view.contiguous(memory_format=torch.channels_last) for view in batch.views))
