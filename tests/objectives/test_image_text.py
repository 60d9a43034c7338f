"""CLIP and SigLIP: equal to naive twins in fp64, to open_clip's losses, over any number of ranks; locked towers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from open_clip.loss import ClipLoss, SigLipLoss
from torch import Tensor, nn

from data_pipeline.batch import Batch
from data_pipeline.errors import InputError
from pretrain.objectives.clip.loss import clip_loss
from pretrain.objectives.contract import PairFeatures
from pretrain.objectives.image_text import ImageText
from pretrain.objectives.siglip.loss import sigmoid_loss
from pretrain.optim.adamw.config import AdamW
from pretrain.optim.sgd.config import Sgd
from pretrain.recipe.recipe import EngineConfig
from pretrain.runtime.collectives import World
from pretrain.runtime.state import Progress
from tests.combinations import drawn
from tests.objectives import towers
from tests.objectives.naive_image_text import pairs_loss
from tests.ranks import run_ranks

START = Progress(0, 10, 0)
KINDS = ["clip", "siglip"]


def unit_features(kind: str, size: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> PairFeatures:
    """Leaves; far from the start, so that no term of the loss is negligible."""
    generator = torch.Generator().manual_seed(seed)
    image, text = torch.randn(2, size, 5, generator=generator, dtype=torch.float64).to(dtype).unbind()
    scale, bias = torch.tensor([7.0, -3.0 if kind == "siglip" else 0.0], dtype=dtype).unbind()
    values = (nn.functional.normalize(image, dim=1), nn.functional.normalize(text, dim=1), scale, bias)
    return PairFeatures(*(value.clone().requires_grad_() for value in values))


def compute(kind: str, features: PairFeatures, **options: Any) -> Tensor:
    """block 3 divides neither the batch nor the texts."""
    if kind == "clip":
        return clip_loss(features, across_ranks=True).loss
    return sigmoid_loss(features, across_ranks=True, block=3, **options).loss


@pytest.mark.parametrize("size", [1, 3, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_equal_the_naive_twin(kind: str, size: int) -> None:
    ours, theirs = unit_features(kind, size), unit_features(kind, size)
    loss, expected = compute(kind, ours), pairs_loss(kind, theirs)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    (3 * loss).backward()
    (3 * expected).backward()
    for name, a, b in zip(PairFeatures._fields, ours, theirs, strict=True):
        if name != "logit_bias" or kind == "siglip":
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-11, msg=name)


def local(features: PairFeatures, world: World) -> PairFeatures:
    rows = slice(world.rank * len(features.image) // world.size, (world.rank + 1) * len(features.image) // world.size)
    parts = (features.image[rows], features.text[rows], features.logit_scale, features.logit_bias)
    return PairFeatures(*(value.detach().clone().requires_grad_() for value in parts))


def theirs_of(kind: str, world: World, implementation: str) -> nn.Module:
    if kind == "clip":
        return ClipLoss(local_loss=True, gather_with_grad=True, rank=world.rank, world_size=world.size)
    return SigLipLoss(rank=world.rank, world_size=world.size, dist_impl=implementation)


def on_ranks(world: World, kind: str, implementation: str) -> dict[str, list[Tensor]]:
    found = {}
    whole = unit_features(kind, 8, torch.float32)
    for name in ("ours", "theirs"):
        mine = local(whole, world)
        if name == "ours":
            loss = compute(kind, mine)
        else:
            given = mine if kind == "siglip" else mine[:3]
            loss = theirs_of(kind, world, implementation)(*given)
        loss.backward()
        found[name] = [loss.detach(), *(v.grad if v.grad is not None else torch.zeros(()) for v in mine)]
    return found


@pytest.mark.parametrize(
    ("kind", "implementation"), [("clip", ""), ("siglip", "bidir"), ("siglip", "shift")], ids=lambda v: v or "gather"
)
@pytest.mark.parametrize("world_size", [1, 2])
def test_it_is_open_clip_s_loss_and_the_mean_over_ranks_is_the_global_one(
    kind: str, implementation: str, world_size: int
) -> None:
    ranks = run_ranks(on_ranks, world_size, kind, implementation)
    for rank in ranks:
        for ours, theirs in zip(rank["ours"], rank["theirs"], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    whole = unit_features(kind, 8)
    expected = pairs_loss(kind, whole)
    expected.backward()
    mean = [sum(values) / world_size for values in zip(*(rank["ours"] for rank in ranks), strict=True)]
    torch.testing.assert_close(mean[0].double(), expected.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(mean[3].double(), whole.logit_scale.grad, rtol=1e-5, atol=1e-7)
    for at, name in ((1, "image"), (2, "text")):  # a rank's gradient of its own features; the engine divides by W
        together = torch.cat([rank["ours"][at] for rank in ranks]) / world_size
        torch.testing.assert_close(together.double(), getattr(whole, name).grad, rtol=1e-5, atol=1e-7)


def test_the_nearest_of_all_texts_is_counted() -> None:
    features = unit_features("siglip", 7)
    cosines = features.image @ features.text.T
    expected = (cosines.argmax(1) == torch.arange(7)).double().mean()
    found = sigmoid_loss(features, across_ranks=False, block=3).metrics["image_to_text"]
    assert found == expected
    assert clip_loss(features, across_ranks=False).metrics["image_to_text"] == expected.float()


def test_in_evaluation_a_rank_needs_no_other() -> None:
    """Ranks judge batches of different sizes, of which no collective could make one."""
    sizes = run_ranks(evaluated, 2)
    assert sizes == [[3, 3], [2, 2]]


def evaluated(world: World) -> list[int]:
    found = []
    for kind in KINDS:
        batch = towers.captioned(3 - world.rank)
        loss = towers.make(kind).eval()(batch, START).loss
        assert torch.isfinite(loss)
        found.append(len(batch))
    return found


# LiT


def test_a_locked_tower_takes_no_gradient_and_stays_in_evaluation_mode() -> None:
    objective = towers.make("clip", timm=True, lock_image=True)
    objective.train()
    assert not any(module.training for module in objective.encoder.modules())
    assert objective.text.training
    objective(towers.captioned(4), START).loss.backward()
    assert all(p.grad is None for p in objective.encoder.parameters())
    assert all(p.grad is not None for p in (*objective.text.parameters(), *objective.projection.parameters()))


@pytest.mark.parametrize("timm", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_the_last_groups_may_stay_unlocked(timm: bool, groups: int) -> None:
    objective = towers.make("clip", timm=timm, lock_image=groups, lock_text=groups)
    locked = {name for name, p in objective.named_parameters() if not p.requires_grad}
    if timm:
        last = {"encoder.norm", "encoder.blocks.1"} | ({"encoder.blocks.0"} if groups == 2 else set())
    else:
        last = (
            {"encoder.proj"} if groups == 1 else {"encoder.proj", "encoder.ln_post", "encoder.transformer.resblocks.1"}
        )
    for name, p in objective.encoder.named_parameters():
        assert p.requires_grad == f"encoder.{name}".startswith(tuple(last)), name
    assert "text.token_embedding.weight" in locked
    assert "text.text_projection" not in locked


def test_more_unlocked_groups_than_there_are_is_refused() -> None:
    with pytest.raises(InputError, match=r"objective\.lock_image: expected fewer than its 4 groups"):
        towers.make("clip", lock_image=4)


def part(batch: Batch, start: int, size: int) -> Batch:
    rows = slice(start, start + size)
    assert batch.tokens is not None
    return Batch(batch.keys[rows], (batch.views[0][rows],), tokens=batch.tokens[rows])


def trained(
    world: World, kind: str, options: dict[str, Any], accumulation: int, stages: Sequence[Any]
) -> dict[int, Any]:
    """Losses, and all parameters after three steps, by stage."""
    from pretrain.engine.engine import Engine

    found = {}
    for stage in stages:
        objective: ImageText = towers.make(kind, **options)
        engine = Engine(
            objective,
            Sgd(kind="sgd", base_lr=1e-2, weight_decay=0.2),
            EngineConfig(zero_stage=stage, precision="fp32"),
            world=world,
            device=torch.device("cpu"),
            micro_size=8 // world.size // accumulation,
            accumulation=accumulation,
            seed=0,
        )
        losses = []
        for at in range(3):
            batch, size = towers.captioned(8, seed=at), 8 // world.size // accumulation
            starts = range(world.rank * 8 // world.size, (world.rank + 1) * 8 // world.size, size)
            result = engine.step([part(batch, start, size) for start in starts], Progress(at, 10, 0), 3e-2)
            losses.append(float(result.metrics["loss"]))
        found[stage] = losses, engine.materialize(engine.objective)
    return found


STAGES = (0, 1, 2, 3)
CUTS = [(1, 2), (2, 1), (2, 2)]  # (ranks, micro-batches of a rank)


def check_cuts(kind: str, cuts: Sequence[tuple[int, int]], stages: Sequence[int]) -> None:
    """With the image tower locked; the scale of CLIP's logits starts just below its bound, and is driven against it."""
    options: dict[str, Any] = {"timm": True, "lock_image": True}
    if kind == "clip":
        options["max_scale"] = options["initial_scale"] = 20.0
    losses, weights = run_ranks(trained, 1, kind, options, 1, (0,))[0][0]
    start = towers.make(kind, **options).state_dict()
    assert all(torch.equal(weights[name], start[name]) for name in weights if name.startswith("encoder."))
    assert not torch.equal(weights["text.text_projection"], start["text.text_projection"])
    if kind == "clip":
        assert weights["logit_scale"].item() <= math.log(20.0) + 1e-6
    for world_size, accumulation in cuts:
        ranks = run_ranks(trained, world_size, kind, options, accumulation, stages)
        for stage in stages:
            mean = torch.tensor([rank[stage][0] for rank in ranks]).mean(0)
            torch.testing.assert_close(mean, torch.tensor(losses), rtol=1e-5, atol=1e-6)
            for name, tensor in ranks[0][stage][1].items():
                torch.testing.assert_close(tensor, weights[name], rtol=1e-3, atol=1e-4, msg=f"{stage} {name}")


@pytest.mark.parametrize(("kind", "combination"), drawn(KINDS, STAGES, CUTS).items())
def test_ranks_stages_and_accumulation_change_nothing(kind: str, combination: tuple[int, tuple[int, int]]) -> None:
    """Each kind once; tests/drills/test_image_text_at_size.py has every stage in every cut."""
    stage, cut = combination
    check_cuts(kind, [cut], [stage])


def pushed(world: World) -> list[float]:
    """The scale after steps from above its bound, and what the second of them computed with, by stage."""
    from pretrain.engine.engine import Engine

    found = []
    for stage in STAGES:
        objective = towers.make("clip", initial_scale=20.0, max_scale=20.0)
        nn.init.constant_(objective.logit_scale, math.log(30.0))
        engine = Engine(
            objective,
            AdamW(base_lr=1e-2),
            EngineConfig(zero_stage=stage, precision="fp32"),
            world=world, device=torch.device("cpu"), micro_size=4, accumulation=1, seed=0,
        )  # fmt: skip
        batch = towers.captioned(4)
        for at in range(2):
            result = engine.step([batch], Progress(at, 20, 0), 1e-7)
        whole = engine.materialize(engine.objective)["logit_scale"].exp().item()
        kept = [
            f.data.exp().item() for f in engine.state.fragments() if f.name == "param/logit_scale" and f.data.numel()
        ]
        found += [whole, *kept, float(result.metrics["logit_scale"])]
    return found


def test_the_scale_of_clip_is_kept_below_its_bound_at_every_stage() -> None:
    for scales in run_ranks(pushed, 2):
        assert all(scale == pytest.approx(20.0, rel=1e-6) for scale in scales), scales
