"""The search is exact: the order of a loop in fp64, ties included, for any tiles, threads and number of ranks."""

from __future__ import annotations

import math
import operator
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain.evals.features import neighbors as neighbours
from pretrain.evals.features.neighbors import GRID, Vectors, nearest, search
from pretrain.runtime.collectives import World
from tests.ranks import run_ranks

# Few distinct values, so that most rows are full of ties, inside and across the k-th place.
levels = st.sampled_from([-1.0, -0.5, 0.0, 0.5, 1.0])


@settings(max_examples=150, deadline=None)
@given(st.data(), st.integers(1, 4), st.integers(1, 12))
def test_of_equally_near_the_first_comes_first(data: st.DataObject, rows: int, columns: int) -> None:
    flat = data.draw(st.lists(levels, min_size=rows * columns, max_size=rows * columns))
    k = data.draw(st.integers(1, columns))
    similarities = torch.tensor(flat).view(rows, columns)
    values, found = nearest(similarities, k)
    for row in range(rows):
        expected = sorted(range(columns), key=lambda c: (-similarities[row, c].item(), c))[:k]
        assert found[row].tolist() == expected
        assert values[row].tolist() == [similarities[row, c].item() for c in expected]


def naive(bank: Tensor, queries: Tensor, k: int) -> list[list[int]]:
    """Written out, in fp64."""

    def cosine(a: list[float], b: list[float]) -> float:
        length = math.hypot(*a) * math.hypot(*b)
        return round(math.fsum(map(operator.mul, a, b)) / length * GRID) / GRID if length else 0.0

    rows = bank.tolist()
    found = []
    for query in queries.tolist():
        cosines = [cosine(row, query) for row in rows]
        found.append(sorted(range(len(rows)), key=lambda i: (-cosines[i], i))[:k])
    return found


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 400), st.integers(1, 3), st.integers(1, 7), st.integers(1, 150))
def test_few_distinct_rows(seed: int, size: int, width: int, tile_queries: int, tile_rows: int) -> None:
    """Most rows have equals, and rows of zeros are among them: nearly every query is in doubt, and settled in fp64."""
    generator = torch.Generator().manual_seed(seed)
    bank = torch.randint(-1, 2, (size, width), generator=generator).float()
    queries = torch.randint(-2, 3, (5, width), generator=generator).float()
    for k in {1, min(size, 20), size}:
        cosines, rows = search(bank, queries, k, tile=(tile_queries, tile_rows))
        assert rows.tolist() == naive(bank, queries, k)
        assert torch.allclose(cosines, F.cosine_similarity(bank[rows].double(), queries[:, None].double(), dim=2))


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 40), st.integers(1, 5), st.integers(100, 700))
def test_maxima_of_blocks_lose_nothing(seed: int, copies: int, k: int, tile_queries: int, tile_rows: int) -> None:
    """Each row several times, far apart: equals inside and across the k-th place, found without a search in fp64."""
    generator = torch.Generator().manual_seed(seed)
    distinct = torch.randn(1500 // copies, 6, generator=generator)
    bank = distinct.repeat(copies, 1)[torch.randperm(len(distinct) * copies, generator=generator)]
    queries = torch.randn(7, 6, generator=generator)
    with (
        patch.multiple(neighbours, BLOCK=4, SPARE=16),
        patch.object(neighbours, "_search_in_fp64", side_effect=AssertionError),
    ):
        _, rows = search(bank, queries, k, tile=(tile_queries, tile_rows))
    assert rows.tolist() == naive(bank, queries, k)


def test_most_blocks_are_passed_over() -> None:
    """The tests above would hold with a plain top-k of every tile, too."""
    generator = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(20_000, 16, generator=generator), torch.randn(10, 16, generator=generator)
    with (
        patch.object(neighbours, "BLOCK", 4),
        patch.object(neighbours, "_greater", wraps=neighbours._greater) as greater,
        patch.object(neighbours, "_search_in_fp64", side_effect=AssertionError),
    ):
        _, rows = search(bank, queries, 10, tile=(10, 1000))
        candidates, _ = neighbours._candidates(Vectors(bank), Vectors(queries), 74, (10, 1000), False)
    assert rows.tolist() == naive(bank, queries, 10)
    plain = F.normalize(queries, dim=1) @ F.normalize(bank, dim=1).T
    assert torch.allclose(candidates, plain.topk(74, dim=1).values, atol=1e-6, rtol=0)  # of those, too, none is lost
    shares = [call.args[1].double().mean().item() for call in greater.call_args_list]
    assert len(shares) >= 15  # of 20 tiles
    assert shares[-1] < 0.05


def test_what_fp32_cannot_tell_apart_is_told_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    centre = torch.randn(1, 64, generator=generator, dtype=torch.float64)
    bank = centre + 1e-7 * torch.randn(600, 64, generator=generator, dtype=torch.float64)
    queries = torch.randn(4, 64, generator=generator, dtype=torch.float64)
    expected = naive(bank, queries, 30)
    plain = nearest(F.normalize(queries.float(), dim=1) @ F.normalize(bank.float(), dim=1).T, 30)[1]
    assert (plain != torch.tensor(expected)).double().mean() > 0.5
    assert search(bank, queries, 30, tile=(3, 200))[1].tolist() == expected


def test_neither_tiles_nor_scale_change_a_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(3001, 37, generator=generator), torch.randn(50, 37, generator=generator)
    cosines, rows = search(bank, queries, 40)
    for tile in ((1, 3001), (7, 64), (50, 101), (13, 1000)):
        other_cosines, other_rows = search(bank, queries, 40, tile=tile)
        assert torch.equal(cosines, other_cosines)
        assert torch.equal(rows, other_rows)
    scale = 2.0 ** torch.randint(-20, 20, (len(bank), 1), generator=generator)
    assert torch.equal(rows, search(bank * scale, queries * 8, 40)[1])


@pytest.mark.parametrize(("width", "count"), [(37, 20_000), (768, 20_000), (2048, 10_000)])
def test_cosines_are_the_same_bits_whichever_way_they_were_found(width: int, count: int) -> None:
    """Tens of thousands, found by candidates, in fp64, and in slices: rounding alone does not make sums equal."""
    generator = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(500, width, generator=generator), torch.randn(count // 100, width, generator=generator)
    with patch.object(neighbours, "_search_in_fp64", side_effect=AssertionError):
        cosines, rows = search(bank, queries, 100)
        alone = [search(bank, query[None], 100) for query in queries[:20]]
    assert torch.equal(cosines[:20], torch.cat([found for found, _ in alone]))
    parts = [search(part, queries, 250)[0] for part in bank.split(250)]
    assert torch.equal(cosines, torch.cat(parts, dim=1).sort(dim=1, descending=True).values[:, :100])
    with (
        patch.object(neighbours, "SPARE", 0),
        patch.object(neighbours, "_search_in_fp64", wraps=neighbours._search_in_fp64) as doubted,
    ):
        bits = search(bank, queries, 100)
    assert len(doubted.call_args.args[1]) == len(queries)
    assert torch.equal(cosines, bits[0])
    assert torch.equal(rows, bits[1])


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation gave."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, (tuple, list)) else [found]:
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return found


@pytest.mark.parametrize("collapsed", [False, True])
def test_similarities_are_never_held_whole(collapsed: bool) -> None:
    bank, queries = torch.randn(4300, 4, generator=torch.Generator().manual_seed(7)).split([4000, 300])
    if collapsed:
        bank = torch.ones_like(bank)
    with Largest() as largest:
        _, rows = search(bank, queries, 10, tile=(32, 512))
    assert largest.numel < 300 * 4000 / 10
    if collapsed:
        assert rows.tolist() == [list(range(10))] * 300


SIZES = (1, 2, 5, 700)


def cases() -> list[tuple[Tensor, Tensor, int]]:
    """Bank, queries, k; equal rows on either side of every border, and banks of fewer rows than ranks."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for size in SIZES:
        distinct = torch.randn(-(-size // 7), 9, generator=generator)
        bank = distinct.repeat(7, 1)[:size]
        queries = torch.cat([torch.randn(20, 9, generator=generator), bank[:1]])
        found += [(bank, queries, k) for k in {1, min(size, 25), min(size, 400)}]
    return found


def found_by(world: World) -> list[tuple[Tensor, Tensor]]:
    return [search(*case, rank=world.rank, world_size=world.size, tile=(8, 100)) for case in cases()]


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_find_what_one_finds(world_size: int) -> None:
    alone = found_by(World())
    assert [rows.tolist() for _, rows in alone] == [naive(*case) for case in cases()]
    for found in run_ranks(found_by, world_size):
        for (cosines, rows), (expected_cosines, expected_rows) in zip(found, alone, strict=True):
            assert torch.equal(rows, expected_rows)
            assert torch.equal(cosines, expected_cosines)
