"""Batch norm over ranks: the same as torch's on all samples in one process."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from pretrain.models.batch_norm import synchronise_batch_norms
from pretrain.runtime.collectives import World, sum_over_ranks
from tests.ranks import run_ranks

SAMPLES = 12
NORMS = {
    "1d": (nn.BatchNorm1d(5), (SAMPLES, 5)),
    "1d over tokens": (nn.BatchNorm1d(5), (SAMPLES, 5, 7)),
    "2d": (nn.BatchNorm2d(5, momentum=0.3), (SAMPLES, 5, 3, 4)),
    "without weights": (nn.BatchNorm1d(5, affine=False), (SAMPLES, 5)),
    "mean of all batches": (nn.BatchNorm1d(5, momentum=None), (SAMPLES, 5)),
    "without running statistics": (nn.BatchNorm1d(5, track_running_stats=False), (SAMPLES, 5)),
    "with activation": (BatchNormAct2d(5, act_layer=nn.SiLU), (SAMPLES, 5, 3, 4)),
}


def made(name: str) -> tuple[nn.Module, list[Tensor], Tensor]:
    """The norm in fp64 with weights of its own, two batches, and the weights of a loss over the outputs."""
    norm, shape = copy.deepcopy(NORMS[name][0]).double(), NORMS[name][1]
    generator = torch.Generator().manual_seed(1)
    for p in norm.parameters():
        p.data.uniform_(0.5, 2, generator=generator)
    # Far from zero and different from rank to rank, so that neither cancellation nor local statistics pass.
    batches = [torch.randn(shape, generator=generator, dtype=torch.float64) * 3 + 40 + 9 * i for i in range(2)]
    for batch in batches:
        batch += torch.arange(SAMPLES).view(-1, *[1] * (batch.ndim - 1))
    return norm, batches, torch.randn(shape, generator=generator, dtype=torch.float64)


def used(norm: nn.Module, batches: list[Tensor], weights: Tensor, rows: slice) -> dict[str, Any]:
    """Output and gradients of two training steps on some rows, and the output in evaluation."""
    inputs = [batch[rows].clone().requires_grad_() for batch in batches]
    outputs = [norm(x) for x in inputs]
    sum((y.square() * weights[rows]).sum() for y in outputs).backward()  # type: ignore[union-attr]
    norm.eval()
    return {
        "outputs": [y.detach() for y in outputs],
        "inputs": [x.grad for x in inputs],
        "parameters": [p.grad for p in norm.parameters()],
        "buffers": list(norm.buffers()),
        "evaluated": norm(inputs[0]).detach(),
    }


def on_a_rank(world: World) -> dict[str, dict[str, Any]]:
    found = {}
    for name in NORMS:
        norm, batches, weights = made(name)
        size = SAMPLES // world.size
        rows = slice(world.rank * size, (world.rank + 1) * size)
        found[name] = used(synchronise_batch_norms(norm, torch.device("cpu")), batches, weights, rows)
        found[name]["parameters"] = [sum_over_ranks(g) for g in found[name]["parameters"]]
    return found


@pytest.mark.parametrize("world_size", [2, 3])
def test_samples_on_several_ranks_are_one_batch(world_size: int) -> None:
    ranks = run_ranks(on_a_rank, world_size)
    for name in NORMS:
        expected = used(*made(name), slice(None))
        parts = [rank[name] for rank in ranks]
        joined = {
            "outputs": [torch.cat(ys) for ys in zip(*(p["outputs"] for p in parts), strict=True)],
            "inputs": [torch.cat(xs) for xs in zip(*(p["inputs"] for p in parts), strict=True)],
            "parameters": parts[0]["parameters"],
            "buffers": parts[0]["buffers"],
            "evaluated": torch.cat([p["evaluated"] for p in parts]),
        }
        if name == "without running statistics":  # then torch evaluates with those of the batch, each rank its own
            del joined["evaluated"], expected["evaluated"]
        for what, value in joined.items():
            torch.testing.assert_close(value, expected[what], rtol=1e-9, atol=1e-9, msg=f"{name}, {what}")
        for rank in parts[1:]:
            assert all(torch.equal(a, b) for a, b in zip(rank["buffers"], parts[0]["buffers"], strict=True)), name


def in_bf16(world: World) -> Tensor:
    norm = synchronise_batch_norms(nn.BatchNorm1d(3), torch.device("cpu"))
    x = (torch.arange(64.0).view(-1, 1) + 300 + torch.arange(3)).bfloat16()
    y = norm(x[world.rank :: world.size])
    assert y.dtype == torch.bfloat16
    return next(norm.buffers()).clone()


def test_statistics_of_bf16_values_are_fp32() -> None:
    mean = run_ranks(in_bf16, 2)[0]
    x = (torch.arange(64.0).view(-1, 1) + 300 + torch.arange(3)).bfloat16()
    torch.testing.assert_close(mean, 0.1 * x.float().mean(0), rtol=1e-6, atol=0)
