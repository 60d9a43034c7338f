"""In which precision a run computes: settled at its start, kept for good, and on a CPU tried before it is trusted."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from data_pipeline.errors import InputError
from pretrain.engine.attention import choose_attention
from pretrain.objectives.blank import blank_batch
from pretrain.objectives.contract import Objective
from pretrain.recipe.files import load_recipe
from pretrain.recipe.recipe import EngineConfig
from pretrain.runtime.agreement import agree
from pretrain.runtime.collectives import from_main, gather_objects, rank_and_size
from pretrain.runtime.native_precision import Precision, native_precision
from pretrain.runtime.run_folder import newest_checkpoint
from pretrain.runtime.state import Progress

_SAMPLES = 2
_BLOCKS = 12  # of memory of each size that are stained: with two, one of three wrong kernels went unseen
# Of a gradient's norm, by which bf16 may be off. Of all objectives and encoders that were tried the worst tensor was
# off by 0.27; what is not computed at all is off by more than the whole, or not finite.
_TOLERANCE = 0.5


def settle_precision(
    config: EngineConfig, resume_from: str | None, objective: Objective, device: torch.device, out: Path
) -> EngineConfig:
    """Returns the settings with `precision` settled. Every rank calls it, and all settle the same.

    `auto` is the precision of the run that is resumed, on whatever machine that began; for a new run it is bf16 where
    the devices of all ranks have instructions for it, else fp32.

    Args:
        config: `engine` of the recipe.
        resume_from: that of the recipe.
        objective: as built, on the CPU; it is left as it was.
        device: of this rank.
        out: the run's folder.

    Raises:
        InputError: bf16 on a CPU that computes wrong gradients in it.
    """
    if config.precision == "auto":
        native = set(gather_objects(native_precision(device)))
        is_main = rank_and_size()[0] == 0
        kept = from_main(agree(lambda: kept_precision(resume_from, out) if is_main else None))
        settled = kept or ("bf16" if native == {"bf16"} else "fp32")
        config = config.model_copy(update={"precision": settled})
    if config.precision == "bf16" and device.type == "cpu":
        agree(lambda: refuse_wrong_bf16(objective))
    return config


def kept_precision(resume_from: str | None, out: Path) -> Precision | None:
    """The precision of the run that is resumed; None: a new run begins."""
    runs = [out] if newest_checkpoint(out) is not None else []
    if resume_from is not None:
        given = Path(resume_from)
        runs.append(given if (given / "checkpoints").is_dir() else given.resolve().parent.parent)
    kept = [load_recipe(run / "recipe.yaml").engine.precision for run in runs if (run / "recipe.yaml").is_file()]
    return kept[0] if kept and kept[0] != "auto" else None


def refuse_wrong_bf16(objective: Objective) -> None:
    """Compares a small batch's gradient in bf16 with that in fp32, both on the CPU.

    Raises:
        InputError: they part; it names the parameters where they do.
    """
    parted = wrong_bf16_gradients(objective)
    if parted:
        listed = ", ".join(f"{name} ({norm:.3g} where fp32 has {right:.3g})" for name, norm, right in parted[:3])
        more = f" and {len(parted) - 3} more" if len(parted) > 3 else ""
        raise InputError(
            where="engine.precision",
            expected="bf16 with the gradients of fp32, up to its rounding, on this CPU",
            found=f"others: the norm of {listed}{more}",
            fix="Set engine.precision=fp32: a kernel of this build of torch computes them wrongly on this CPU.",
        )


def wrong_bf16_gradients(objective: Objective) -> list[tuple[str, float, float]]:
    """Parameters whose gradients in bf16 are not those in fp32: name, norm in bf16, norm in fp32; the worst first."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        batch = blank_batch(objective.needs, _SAMPLES)
        batch = replace(batch, views=tuple(torch.randn_like(view) for view in batch.views))
        was_training = objective.training
        objective.eval()  # no collectives, and running statistics stay untouched

        def gradients(dtype: torch.dtype | None) -> dict[str, Tensor]:
            with _stained_memory(objective):
                with torch.autocast("cpu", dtype, enabled=dtype is not None):
                    loss = objective(batch, Progress(0, 1, 0)).loss
                loss.backward()
            found = {name: p.grad for name, p in objective.named_parameters() if p.grad is not None}
            objective.zero_grad(set_to_none=True)
            return found

        try:
            return _parted(*_in_both(objective, gradients))
        finally:
            objective.train(was_training)


def _in_both(
    objective: Objective, gradients: Callable[[torch.dtype | None], dict[str, Tensor]]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradients in fp32 and in bf16, with the attention that a run in bf16 has."""
    choose_attention(objective, torch.device("cpu"), "bf16")
    return gradients(None), gradients(torch.bfloat16)


def _parted(right: dict[str, Tensor], found: dict[str, Tensor]) -> list[tuple[str, float, float]]:
    """Those that are off by half of themselves and a hundredth of the whole gradient: some are all but zero."""
    norms = {name: float(gradient.norm()) for name, gradient in right.items()}
    whole = math.sqrt(sum(norm**2 for norm in norms.values()))
    off = {name: float((found[name] - gradient).norm()) for name, gradient in right.items()}
    wrong = [name for name in norms if not off[name] <= _TOLERANCE * norms[name] + 0.01 * whole]
    wrong.sort(key=lambda name: -off[name] if math.isfinite(off[name]) else -math.inf)
    return [(name, float(found[name].norm()), norms[name]) for name in wrong]


@contextmanager
def _stained_memory(module: nn.Module) -> Iterator[None]:
    """Within, memory that is freed before each layer's backward pass is no longer zero by chance.

    A kernel that does not write all of its result leaves in it what the memory held: nothing in a fresh process, and
    anything later.
    """
    pins: list[Tensor] = []  # keep the heap from shrinking

    def stain(layer: nn.Module, _: object) -> None:
        sizes = [p.numel() * width for p in layer.parameters(recurse=False) for width in (2, 4)]
        held = [torch.full((size,), 255, dtype=torch.uint8) for size in sizes for _ in range(_BLOCKS)]
        pins.append(torch.full((64,), 255, dtype=torch.uint8))
        del held

    layers = [layer for layer in module.modules() if isinstance(layer, nn.modules.conv._ConvNd)]
    hooks = [layer.register_full_backward_pre_hook(stain) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
