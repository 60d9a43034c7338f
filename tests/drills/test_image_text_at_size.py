"""CLIP and SigLIP where sizes begin to matter: a batch that only fits in parts, weights that ZeRO 3 really shards."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from data_pipeline.batch import Batch
from pretrain.models.config import ImageTower, OpenClip, TextTower
from pretrain.objectives.clip.config import ClipConfig
from pretrain.objectives.contract import Objective
from pretrain.objectives.kinds import build_objective
from pretrain.objectives.siglip.config import SiglipConfig
from pretrain.runtime.collectives import World
from pretrain.runtime.state import Progress
from tests.contracts.test_cut_batches import SGD, rows
from tests.contracts.test_objectives import batch_for
from tests.engine.test_engine import make_engine, whole_state
from tests.engine.test_two_passes import Kept
from tests.objectives.test_image_text import CUTS, STAGES, check_cuts
from tests.ranks import run_ranks

pytestmark = pytest.mark.slow

CONFIGS = {"clip": ClipConfig(kind="clip"), "siglip": SiglipConfig(kind="siglip")}
GLOBAL_SIZE = 512


def towers(kind: str, width: int, image_size: int = 32) -> Objective:
    torch.manual_seed(0)
    model = OpenClip(
        library="open_clip",
        name="own",
        image_size=image_size,
        embed_dim=32,
        image=ImageTower(width=width, layers=2, heads=4, patch_size=8),
        text=TextTower(width=width, layers=2, heads=4, context_length=12, vocab_size=512),
    )
    return build_objective(model, CONFIGS[kind])


def batch_of(objective: Objective, size: int) -> Batch:
    return batch_for(objective.needs, size)


def accumulated(world: World, kind: str, micro_batches: int) -> tuple[float, dict[str, Tensor], int]:
    """Loss, gradients, and the most bytes kept for backward passes at a time, of one step."""
    objective = towers(kind, width=64)
    engine = make_engine(world, 1, micro_batches, objective=objective, optim=SGD, global_size=GLOBAL_SIZE)
    batch, size = batch_of(objective, GLOBAL_SIZE), GLOBAL_SIZE // micro_batches
    parts = [rows(batch, start, start + size) for start in range(0, GLOBAL_SIZE, size)]
    kept = Kept(objective)
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda tensor: tensor):
        result = engine.step(parts, Progress(0, 10, 0), 1e-2)
    prefix = "optim/momentum_buffer/"
    gradients = {n.removeprefix(prefix): t for n, t in whole_state(engine).items() if n.startswith(prefix)}
    return float(result.metrics["loss"]), gradients, kept.peak


@pytest.mark.parametrize("kind", CONFIGS)
def test_sixteen_micro_batches_are_one_batch_in_an_eighth_of_the_memory(
    kind: str, figure: Callable[[str], None]
) -> None:
    whole_loss, expected, whole_peak = run_ranks(accumulated, 1, kind, 1)[0]
    loss, found, peak = run_ranks(accumulated, 1, kind, 16)[0]
    assert loss == pytest.approx(whole_loss, rel=1e-5)
    assert found.keys() == expected.keys()
    whole = torch.cat([gradient.flatten() for gradient in expected.values()]).norm()
    worst = max(
        float((found[name] - gradient).norm() / gradient.norm().clamp(min=1e-3 * whole))
        for name, gradient in expected.items()
    )
    figure(f"{kind}: gradients within {worst:.1e}; {whole_peak / 2**20:.0f} and {peak / 2**20:.1f} MiB for backward")
    assert worst < 1e-5
    assert peak < whole_peak / 8


def losses(world: World, kind: str, stage: int) -> tuple[list[float], int]:
    """Of four steps, with an evaluation between; and how many of the parameters lie in pieces."""
    objective = towers(kind, width=320)  # DeepSpeed leaves parameters below 100,000 elements whole
    engine = make_engine(world, stage, objective=objective, global_size=8)
    batch, found = batch_of(objective, 8), []
    share = rows(batch, world.rank * 8 // world.size, (world.rank + 1) * 8 // world.size)
    for at in range(4):
        found.append(float(engine.step([share], Progress(at, 10, 0), 1e-3).metrics["loss"]))
        if at == 1:
            engine.evaluate(share, Progress(at, 10, 0))
    return found, sum(p.numel() == 0 for p in objective.parameters())


@pytest.mark.parametrize("kind", CONFIGS)
def test_towers_train_where_their_weights_are_in_pieces(kind: str, figure: Callable[[str], None]) -> None:
    """open_clip reads some of them outside of the modules that they belong to."""
    start = time.perf_counter()
    whole, sharded = (run_ranks(losses, 2, kind, stage) for stage in (1, 3))
    figure(f"{kind}: {time.perf_counter() - start:.0f} s, {sharded[0][1]} parameters in pieces")
    assert whole[0][1] == 0
    assert sharded[0][1] > 10
    for (ours, _), (theirs, _) in zip(sharded, whole, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_attention_of_torch_is_among_what_is_in_pieces() -> None:
    attention = [m for m in towers("clip", width=320).modules() if isinstance(m, nn.MultiheadAttention)]
    assert attention
    assert all(m.out_proj.weight.numel() > 100_000 for m in attention)


@pytest.mark.parametrize("kind", CONFIGS)
def test_ranks_stages_and_accumulation_change_nothing(kind: str) -> None:
    """Small towers, at every stage in every cut."""
    check_cuts(kind, [(1, 1), *CUTS], STAGES)
