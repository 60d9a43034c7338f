"""What a rank keeps at each ZeRO stage against the formula; what activation checkpointing saves of activations."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from data_pipeline.batch import Batch, BatchSpec
from pretrain.engine.activation_checkpointing import checkpoint_activations
from pretrain.models.blocks import repeated_blocks
from pretrain.objectives.contract import LossOutput, Objective
from pretrain.objectives.kinds import build_objective
from pretrain.objectives.supervised.config import SupervisedConfig
from pretrain.plan import model_state_bytes
from pretrain.recipe import recipe
from pretrain.runtime.collectives import World
from pretrain.runtime.state import Progress
from tests.engine.test_engine import STAGES, make_engine
from tests.ranks import run_ranks
from tests.toy import split, toy_batch

WORLD_SIZE = 2
WIDTHS = (301, 601, 901)  # 0.4, 1.5 and 3.3 million parameters
MARGIN = 1.1


class Mlp(Objective):
    """Nearly all of it in a few large matrices, of odd width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.needs = BatchSpec(image_size=5, num_classes=3)
        hidden = (nn.Linear(width, width) for _ in range(4))
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(75, width), *hidden, nn.Linear(width, 3))

    def forward(self, batch: Batch, progress: Progress) -> LossOutput:
        assert batch.labels is not None
        return LossOutput(nn.functional.cross_entropy(self.encoder(batch.views[0]), batch.labels))


def storages() -> dict[int, int]:
    """Bytes of every storage that a living tensor lies in, by address; those shared are counted once."""
    found = {}
    for item in gc.get_objects():
        if type(item) in (Tensor, nn.Parameter) and item.numel():
            storage = item.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found


def kept_while_stepping(world: World, width: int) -> dict[int, tuple[int, int]]:
    """Number of parameters, and bytes of tensors that are new since before the engine was built, by stage.

    They are counted as the optimizer begins on each parameter group, whose gradients are let go of after its step. What
    a thread of gloo has reduced it lets go of when it is its turn: that is waited for.
    """
    found = {}
    for stage in STAGES:
        gc.collect()
        before = storages()
        objective = Mlp(width)
        num_parameters = sum(p.numel() for p in objective.parameters())
        most = MARGIN * model_state_bytes(num_parameters, stage, WORLD_SIZE)
        engine = make_engine(world, stage, objective=objective)
        bucket = engine._deepspeed.zero_reduce_bucket_size() * 4 if stage == 3 else 0
        seen: list[int] = []

        def look(*_: Any, before: dict[int, int] = before, seen: list[int] = seen, most: float = most + bucket) -> None:
            deadline = time.monotonic() + 30
            while (kept := _new_since(before)) > most and time.monotonic() < deadline:
                time.sleep(0.01)
            seen.append(kept)

        engine.optimizer.register_step_pre_hook(look)
        for at in range(2):
            engine.step(split(toy_batch(at), world.rank, world.size, 1), Progress(at, 9, 0), 1e-3)
        found[stage] = (num_parameters, max(seen) - bucket)
        del engine, objective
    return found


def _new_since(before: dict[int, int]) -> int:
    gc.collect()
    return sum(size for at, size in storages().items() if at not in before)


@pytest.mark.parametrize("width", WIDTHS)
def test_a_rank_keeps_what_the_formula_says(width: int, figure: Callable[[str], None]) -> None:
    """The bucket in which ZeRO 3 reduces gradients, whose size does not depend on the model, is left out."""
    for found in run_ranks(kept_while_stepping, WORLD_SIZE, width):
        for stage, (num_parameters, kept) in found.items():
            formula = model_state_bytes(num_parameters, stage, WORLD_SIZE)
            figure(
                f"{num_parameters} parameters, ZeRO {stage}: {kept / num_parameters:.2f} bytes a parameter, "
                f"formula {formula / num_parameters:.2f}, ratio {kept / formula:.3f}"
            )
            assert kept == pytest.approx(formula, rel=MARGIN - 1)


VIT = recipe.Model(
    name="vit_tiny_patch16_224",
    image_size=64,
    patch_size=8,
    options={"depth": 6, "class_token": False, "global_pool": "avg", "fc_norm": False},
)


def saved_for_backward(checkpointed: bool) -> tuple[int, int]:
    """Bytes that autograd keeps between the passes, parameters apart; and bytes of the inputs of all blocks."""
    torch.manual_seed(0)
    objective = build_objective(VIT, SupervisedConfig(kind="supervised", num_classes=3))
    blocks = list(repeated_blocks(objective).values())
    if checkpointed:
        checkpoint_activations(blocks, device=torch.device("cpu"), dtype=None, offload=False)
    inputs: list[int] = []
    for block in blocks:
        block.register_forward_pre_hook(lambda _, args: inputs.append(args[0].nbytes))
    parameters = {p.untyped_storage().data_ptr() for p in objective.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    batch = Batch(tuple("abcdefgh"), (torch.randn(8, 3, 64, 64),), labels=torch.zeros(8, dtype=torch.int64))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = objective(batch, Progress(0, 1, 0)).loss
    kept = sum(saved.values())
    loss.backward()
    return kept, sum(inputs)


def test_checkpointed_blocks_keep_their_inputs_and_nothing_else(figure: Callable[[str], None]) -> None:
    """What is left beside them is the stem's and the head's."""
    whole, _ = saved_for_backward(checkpointed=False)
    kept, inputs = saved_for_backward(checkpointed=True)
    figure(f"kept for the backward pass: {whole / 2**20:.1f} MiB; with checkpointing {kept / 2**20:.1f} MiB")
    figure(f"inputs of the blocks: {inputs / 2**20:.1f} MiB")
    assert inputs <= kept < 2 * inputs
    assert kept < 0.2 * whole
