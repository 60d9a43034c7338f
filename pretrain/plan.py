"""What a run will take: memory of a rank, bytes of a checkpoint. It is counted, on the meta device.

Activations are not in it: they depend on the device's kernels, and are measured rather than counted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.models.config import ModelConfig
from pretrain.objectives.config import ObjectiveConfig
from pretrain.objectives.contract import Objective
from pretrain.objectives.kinds import build_objective
from pretrain.optim.config import Ema, OptimConfig
from pretrain.optim.optimizers import build_optimizer, empty_state
from pretrain.recipe.recipe import EngineConfig


@dataclass(frozen=True)
class Footprint:
    """What a run takes, in bytes but for the counts of parameters.

    Attributes:
        num_trained: parameters that the optimizer steps.
        num_frozen: the others, momentum teachers among them.
        device: of one rank where it computes, while it steps.
        host: of one rank in CPU memory besides: what is offloaded, and its share of a checkpoint that is being written.
        checkpoint: of one, over all ranks.
    """

    num_trained: int
    num_frozen: int
    device: float
    host: float
    checkpoint: int


def build_on_meta(model: ModelConfig, objective: ObjectiveConfig) -> Objective:
    """Builds an objective's shapes alone, without memory for its weights.

    Raises:
        InputError: the model or the objective cannot be built.
    """
    with torch.device("meta"):
        return build_objective(model, objective)


def footprint(
    objective: Objective,
    optim: OptimConfig,
    engine: EngineConfig,
    ema: Ema | None,
    *,
    world_size: int,
    probe_bytes: int = 0,
) -> Footprint:
    """Counts what training an objective takes on so many ranks.

    Args:
        objective: may be on the meta device.
        optim: steps it.
        engine: says what is sharded and offloaded.
        ema: moving average of the weights; None: there is none.
        world_size: ranks.
        probe_bytes: of the online probe's state.
    """
    trained = sum(p.numel() for p in objective.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in objective.parameters()) - trained
    moments = _moments(objective, optim) / max(1, trained)
    stage, share = engine.zero_stage, 1 / world_size
    states = model_state_bytes(trained, stage, world_size, moments)
    offloaded = 4 * trained * share * (1 + moments) if engine.offload_optimizer else 0.0
    kept = 4 * frozen * (share if stage == 3 else 1)
    if ema is not None:
        kept += 4 * trained * (share if stage else 1) + sum(buffer.nbytes for buffer in _statistics(objective))
    checkpoint = checkpoint_bytes(objective, optim, ema, probe_bytes)
    return Footprint(
        num_trained=trained,
        num_frozen=frozen,
        device=states - offloaded + kept + sum(b.nbytes for b in objective.buffers()) + probe_bytes,
        host=offloaded + checkpoint * share,
        checkpoint=checkpoint,
    )


def model_state_bytes(num_parameters: int, stage: int, world_size: int, moments: float = 2) -> float:
    """Counts the bytes of parameters, gradients and the optimizer's state on one rank while it steps, in fp32.

    Rajbhandari et al. 2019 (arXiv:1910.02054), section 3.1, counts (2 + 2 + 12) bytes per parameter of mixed precision:
    working weights and gradients in 16 bits; master, momentum and variance in 32. Here everything is 32 bits, and
    DeepSpeed, whose partitions these are, has more copies than the paper:

    - ZeRO 0: weight, gradient, moments. No master, as the weights are fp32 themselves.
    - ZeRO 1, 2: all the working weights; of the rank's share the master, the moments, the gradient as it was reduced,
      and its copy in one flat tensor, which is what the optimizer is given. Stage 1 holds whole gradients in the
      backward pass, and by the time of the step has let go of them.
    - ZeRO 3: of the rank's share, the same and the working weight.

    Args:
        moments: tensors that the optimizer keeps of each parameter: 2 of AdamW and LAMB, 1 of momentum.
    """
    share = 1 / world_size
    partition = (3 + moments) * share
    copies = {0: 2 + moments, 1: 1 + partition, 2: 1 + partition, 3: share + partition}[stage]
    return 4 * num_parameters * copies


def checkpoint_bytes(objective: Objective, optim: OptimConfig, ema: Ema | None, probe_bytes: int = 0) -> int:
    """Counts the bytes of a checkpoint's tensors, which do not depend on the number of ranks; as for `footprint`."""
    parameters, buffers = list(objective.parameters()), _persistent_buffers(objective)
    total = sum(int(tensor.nbytes) for tensor in (*parameters, *buffers)) + 4 * _moments(objective, optim)
    if ema is not None:
        averaged = [p for p in parameters if p.requires_grad]
        total += sum(int(tensor.nbytes) for tensor in (*averaged, *_statistics(objective)))
    return total + probe_bytes


def _persistent_buffers(objective: Objective) -> list[Tensor]:
    parameters = dict(objective.named_parameters())
    return [value for name, value in objective.state_dict(keep_vars=True).items() if name not in parameters]


def _statistics(objective: Objective) -> list[Tensor]:
    """The running statistics, which are averaged with the weights."""
    return [buffer for buffer in _persistent_buffers(objective) if buffer.is_floating_point()]


def _moments(objective: Objective, optim: OptimConfig) -> int:
    """Counts the elements of all tensors that the optimizer keeps of parameters; its step counts are none."""
    optimizer = build_optimizer(objective, optim)
    return sum(
        value.numel()
        for group in optimizer.param_groups
        for p in group["params"]
        for value in empty_state(group, p).values()
        if value.shape == p.shape
    )
