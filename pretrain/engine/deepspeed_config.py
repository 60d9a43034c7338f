"""A recipe's engine, in DeepSpeed's words."""

from __future__ import annotations

from typing import Any

from pretrain.recipe.recipe import EngineConfig


def deepspeed_config(
    config: EngineConfig, *, clip_norm: float | None, world_size: int, micro_size: int, accumulation: int
) -> dict[str, Any]:
    """The dictionary that `deepspeed.initialize` takes.

    Args:
        config: ZeRO stage, precision, offload.
        clip_norm: of the global gradient at stages 1-3; stage 0 is clipped by the engine.
        world_size: ranks.
        micro_size: samples of one forward pass on one rank.
        accumulation: forward passes of one step on one rank.
    """
    # Its own choice, ten times as many elements, takes 2 GB in fp32 at stage 3 whatever the size of the model.
    zero: dict[str, Any] = {"stage": config.zero_stage, "reduce_bucket_size": 50_000_000}
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    settings: dict[str, Any] = {
        "train_batch_size": micro_size * accumulation * world_size,
        "train_micro_batch_size_per_gpu": micro_size,
        "gradient_accumulation_steps": accumulation,
        # DeepSpeed clips to 1.0 where nothing is said.
        "gradient_clipping": 0.0 if config.zero_stage == 0 or clip_norm is None else clip_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # its own compiles kernels when first used
        "steps_per_print": 10**12,
    }
    if config.settled_precision == "bf16":
        # No lower-precision modules: parameters, gradients and their reduction stay fp32.
        settings["torch_autocast"] = {
            "enabled": True,
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        }
    return settings
