"""SimCLR equals its naive twin at any number of ranks, and what its loss is where that is known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from data_pipeline.batch import Batch
from pretrain.objectives.simclr.config import SimClrConfig
from pretrain.objectives.simclr.loss import nt_xent
from pretrain.objectives.simclr.objective import SimClr
from pretrain.preflight import cannot_accumulate
from pretrain.runtime.collectives import World
from tests.objectives import cases, naive, naive_siamese, papers
from tests.objectives.cases import Case, Twin
from tests.ranks import run_ranks

SIMCLR = SimClrConfig(kind="simclr", hidden_width=24, out_width=12, temperature=0.5)
CASES = {"simclr": Case(cases.TINY_RESNET, SIMCLR), "simclr, vit": Case(cases.TINY_VIT, SIMCLR)}


def naive_loss(objective: SimClr, weights: naive.Weights, batch: Batch) -> Tensor:
    shape = naive.Shape(2, 3, 2, class_token=False)
    rows = [row for view in batch.views for row in naive_siamese.features(weights, "", view, shape)]
    return views_loss(naive_siamese.head(weights, "projector", rows), 0.5)


def views_loss(rows: list[Tensor], temperature: float) -> Tensor:
    """The paper's Eq. 1 of each view, the mean over all of them; the views of image i are rows i and B + i."""
    units = [torch.stack(naive_siamese.unit(row)) for row in rows]
    total = torch.zeros((), dtype=rows[0].dtype)
    for i, anchor in enumerate(units):
        terms = [torch.exp((anchor * other).sum() / temperature) for other in units]
        positive = terms[(i + len(rows) // 2) % len(rows)]
        others = sum(term for j, term in enumerate(terms) if j != i)
        total = total - torch.log(positive / others) / len(rows)
    return total


TWIN = Twin(Case(cases.TWIN_VIT, SIMCLR), naive_loss, batch_size=3)

PUBLISHED: dict[str, papers.Numbers] = {}

# Chen et al. 2020 (2002.05709), sections 2 and 6, appendix A.
PUBLISHED["simclr_resnet50"] = {
    "batch": 4096,
    "schedule": {"kind": "cosine", "epochs": 1000, "warmup": 10},
    "optim": {
        "kind": "lars",
        "peak_lr": 0.3 * 4096 / 256,
        "lr_batch": 256,
        "momentum": 0.9,
        "eta": 1e-3,
        "weight_decay": 1e-6,
    },
    "views": {"scale": (0.08, 1.0), "interpolation": "bicubic", "eval_crop": 0.875},
    "augment": (
        {
            "jitter": {"probability": 0.8, "brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2},
            "grayscale": 0.2,
            "blur": {"probability": 0.5, "sigma": papers.BLUR},
        },
    ),
    "model": {"name": "resnet50", "image_size": 224},
    "objective": {
        "kind": "simclr",
        "projector_layers": 2,
        "hidden_width": 2048,
        "out_width": 128,
        "temperature": 0.1,
    },
}


def projections(size: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, size, 5, generator=generator, dtype=torch.float64).unbind()
    return first, second


def on_a_rank(world: World) -> tuple[float, Tensor, Tensor]:
    """The loss of this rank's share, and its gradients."""
    share = slice(world.rank * 8 // world.size, (world.rank + 1) * 8 // world.size)
    first, second = (view[share].clone().requires_grad_() for view in projections())
    loss = nt_xent(first, second, 0.3, across_ranks=True).loss
    loss.backward()
    assert first.grad is not None
    assert second.grad is not None
    return loss.item(), first.grad, second.grad


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_mean_over_ranks_is_the_loss_of_the_global_batch(world_size: int) -> None:
    """In value and gradient, which the engine divides by the number of ranks."""
    first, second = (view.requires_grad_() for view in projections())
    expected = views_loss([*first, *second], 0.3)
    expected.backward()  # type: ignore[no-untyped-call]
    ranks = run_ranks(on_a_rank, world_size)
    assert sum(rank[0] for rank in ranks) / world_size == pytest.approx(expected.item(), rel=1e-12)
    for at, whole in ((1, first), (2, second)):
        found = torch.cat([rank[at] for rank in ranks]) / world_size
        torch.testing.assert_close(found, whole.grad, rtol=1e-9, atol=1e-12)


def test_of_views_that_are_unrelated_the_loss_is_the_logarithm_of_their_number() -> None:
    first, second = torch.randn(2, 16, 1 << 14, generator=torch.Generator().manual_seed(0)).unbind()
    assert nt_xent(first, second, 1.0, across_ranks=False).loss.item() == pytest.approx(math.log(31), abs=0.01)
    output = nt_xent(first, first, 0.01, across_ranks=False)
    assert output.loss.item() == pytest.approx(0, abs=1e-6)
    assert output.metrics["view_to_view"] == 1


def test_accumulation_is_refused_with_the_reason() -> None:
    assert "compares all views of a batch" in cannot_accumulate(CASES["simclr, vit"].build())
