"""What follows from a recipe: sizes and steps at a world size, and the identity of its run."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from typing import Any

from data_pipeline.errors import RecipeError
from pretrain.recipe.recipe import Recipe


@dataclass(frozen=True)
class Resolved:
    """The derived values of a run; nothing else derives any.

    Attributes:
        world_size: ranks.
        num_samples: of the training set.
        global_size: samples of one step, over all ranks.
        local_size: samples of one step on one rank.
        micro_size: samples of one forward pass on one rank.
        accumulation: forward passes of one step on one rank.
        total_steps: the first whole step at which the schedule's epochs or samples have been seen.
        warmup_steps: steps of linear warmup, fewer than total_steps.
        steps_per_epoch: not whole in general, epochs are laid end to end.
        peak_lr: the learning rate after warmup, scaled linearly with the global batch (1706.02677).
    """

    world_size: int
    num_samples: int
    global_size: int
    local_size: int
    micro_size: int
    accumulation: int
    total_steps: int
    warmup_steps: int
    steps_per_epoch: float
    peak_lr: float


def resolve(recipe: Recipe, world_size: int, num_samples: int) -> Resolved:
    """Derives the sizes, steps and peak learning rate of a run.

    Raises:
        RecipeError: the ranks do not divide the global batch, or micro-batches do not divide a rank's share;
            the nearest working values are in the message.
        ValueError: world_size or num_samples is below 1.
    """
    if world_size < 1 or num_samples < 1:
        raise ValueError(f"world_size {world_size} and num_samples {num_samples} must be at least 1")
    local_size, micro_size = split_batch(recipe, world_size)
    global_size, schedule = recipe.batch.global_size, recipe.schedule
    to_see = schedule.samples or (schedule.epochs or 0) * num_samples
    # A billionth is rounding (0.1 + 0.2 epochs), not a step more.
    total_steps = schedule.steps or max(1, math.ceil(to_see / global_size * (1 - 1e-9)))
    lr_batch = recipe.optim.lr_batch
    return Resolved(
        world_size=world_size,
        num_samples=num_samples,
        global_size=global_size,
        local_size=local_size,
        micro_size=micro_size,
        accumulation=local_size // micro_size,
        total_steps=total_steps,
        warmup_steps=min(round(schedule.warmup * total_steps), total_steps - 1),
        steps_per_epoch=num_samples / global_size,
        peak_lr=recipe.optim.base_lr * (global_size / lr_batch if lr_batch else 1),
    )


def split_batch(recipe: Recipe, world_size: int) -> tuple[int, int]:
    """Samples of one step on one rank, and of one forward pass there; RecipeError as in `resolve`."""
    global_size = recipe.batch.global_size
    local_size, rest = divmod(global_size, world_size)
    if rest:
        sizes = [size for size in (global_size - rest, global_size - rest + world_size) if size]
        problem = (
            f"batch.global_size: expected a multiple of the number of processes, {world_size}, "
            f"found {global_size}. Nearest: batch.global_size {_either(sizes)}, "
            f"or {_either(_nearest_divisors(global_size, world_size))} processes."
        )
        raise RecipeError(recipe.name, [problem])
    micro_size = recipe.batch.micro_size or local_size
    if local_size % micro_size:
        problem = (
            f"batch.micro_size: expected a divisor of {local_size} (batch.global_size {global_size} over "
            f"{world_size} processes), found {micro_size}. "
            f"Nearest: {_either(_nearest_divisors(local_size, micro_size))}."
        )
        raise RecipeError(recipe.name, [problem])
    return local_size, micro_size


def _nearest_divisors(number: int, wanted: int) -> list[int]:
    """The largest divisor of `number` up to `wanted`, and the smallest from there on, if there is one."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    divisors = sorted({*small, *(number // d for d in small)})
    below = [d for d in divisors if d <= wanted]
    above = [d for d in divisors if d >= wanted]
    return below[-1:] + above[:1]


def _either(values: list[int]) -> str:
    return " or ".join(map(str, values))


# The groups that change results, and in them the keys that do not: where the data lie and how they come here (the
# manifest's fingerprint says which data they are), what is only measured on, a budget, how a rank cuts up its share.
_INCLUDED = {"seed", "data", "model", "objective", "optim", "schedule", "batch", "ema", "resume_from", "init_from"}
_EXCLUDED = {"data": {"train", "val", "max_bad_samples", "cache"}, "batch": {"micro_size"}}


def identity(recipe: Recipe) -> str:
    """SHA-256 (hex) over everything in a recipe that changes results, the data apart.

    Independent of the order of keys and of whether a default is written out: a key that is added to the
    recipe one day leaves older runs what they were.
    """
    return hashlib.sha256(json.dumps(result_settings(recipe), sort_keys=True).encode()).hexdigest()


def result_settings(recipe: Recipe, *, with_defaults: bool = False) -> dict[str, Any]:
    """What the identity is made of, as JSON: all that differs from its default, or all.

    A key that was renamed stands here under its former name, so that a run stays the run that it was.
    """
    return recipe.model_dump(
        mode="json", include=_INCLUDED, exclude=_EXCLUDED, exclude_defaults=not with_defaults, by_alias=True
    )


def differences(given: Recipe, kept: Recipe) -> list[str]:
    """What makes two identities differ, by dotted path: "optim.base_lr: 0.001 given, 0.002 kept"."""
    ours, theirs = _leaves(given), _leaves(kept)
    return [
        f"{path}: {ours.get(path, 'nothing')} given, {theirs.get(path, 'nothing')} kept"
        for path in dict.fromkeys([*ours, *theirs])
        if ours.get(path) != theirs.get(path)
    ]


def _leaves(recipe: Recipe) -> dict[str, str]:
    """Every value that goes into the identity, as JSON, by dotted path."""
    leaves: dict[str, str] = {}

    def walk(path: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{path}.{key}" if path else key, inner)
        else:
            leaves[path] = json.dumps(value)

    walk("", recipe.model_dump(mode="json", include=_INCLUDED, exclude=_EXCLUDED))
    return leaves


def is_longer(given: Recipe, kept: Recipe) -> bool:
    """Whether nothing that makes up the identity differs but how long the run is."""
    length = {key: getattr(kept.schedule, key) for key in ("epochs", "steps", "samples")}
    schedule = given.schedule.model_copy(update=length)
    return identity(given) != identity(kept) == identity(given.model_copy(update={"schedule": schedule}))
