"""SigLIP's loss at a global batch of 32,768 over two processes: the matrix of all pairs is never held."""

from __future__ import annotations

import ctypes
import resource
import time
from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F

from pretrain.objectives.contract import PairFeatures
from pretrain.objectives.siglip.loss import sigmoid_loss
from pretrain.runtime.collectives import World
from tests.ranks import run_ranks

GLOBAL_SIZE, WIDTH = 32_768, 64
M_MMAP_THRESHOLD = -3  # of malloc.h
MATRIX = 4 * GLOBAL_SIZE**2  # bytes, of fp32 logits


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def loss_and_backward(world: World) -> tuple[int, float, float]:
    """(bytes above what the process held before, seconds, loss); the libraries' own pages are touched before."""
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 20)  # what is freed is gone, whatever the order of blocks
    both_passes(world, 64)
    before, start = peak_bytes(), time.perf_counter()
    loss = both_passes(world, GLOBAL_SIZE // world.size)
    return peak_bytes() - before, time.perf_counter() - start, loss


def both_passes(world: World, size: int) -> float:
    generator = torch.Generator().manual_seed(world.rank)
    image, text = (F.normalize(torch.randn(size, WIDTH, generator=generator), dim=1) for _ in range(2))
    features = PairFeatures(
        image.requires_grad_(), text.requires_grad_(), torch.tensor(10.0, requires_grad=True),
        torch.tensor(-10.0, requires_grad=True),
    )  # fmt: skip
    loss = sigmoid_loss(features, across_ranks=True).loss
    loss.backward()
    assert all(value.grad is not None and torch.isfinite(value.grad).all() for value in features)
    return loss.item()


@pytest.mark.slow
def test_memory_stays_far_below_the_matrix_of_all_pairs(figure: Callable[[str], None]) -> None:
    ranks = run_ranks(loss_and_backward, 2)
    for held, seconds, loss in ranks:
        figure(f"{held / 1e6:.0f} MB above the baseline, {seconds:.1f} s, loss {loss:.4f}")
        assert held < MATRIX / 20
