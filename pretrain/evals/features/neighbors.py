"""The nearest rows of a bank by cosine: the same for any chunks, threads and number of ranks.

The last bits of a matrix product depend on the shapes it is computed in, and near rows change places with them. So
products only choose candidates. What is given and ordered is the cosine of each pair by itself, in fp64, its additions
always in the same order, on a grid on which equal directions are equal. The fast products, in fp32, choose a few
candidates more than are asked for, and a bound of their errors tells whether a row left out could have been among the
nearest; a query of which it does not exclude that is compared with the whole bank in fp64, by products again: there
alone, of rows whose cosines differ by less than two steps of the grid at the k-th place, either may be taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

from data_pipeline.progress import track
from pretrain.evals.features.extract import full_precision
from pretrain.runtime.collectives import gather_rows

TILE = (1024, 16384)  # queries and rows of the bank compared at a time: 64 MiB in fp32
BLOCK = 64  # neighbouring similarities that are looked at only if their maximum is large enough
DENSE = 0.25  # share of such blocks from which a plain top-k is the faster
SPARE = 64  # candidates beyond k: with fewer, more queries are in doubt; with more, each costs more
GRID = 2.0**40  # steps of a cosine: of 9e-13, where sums of fp64 err by 1e-13 at the most
PRODUCTS = 2**20  # in fp64, that are added up at a time: 8 MiB, near to a cache's


class Vectors:
    """Rows [N, D] and their lengths [N] fp64; a row of zeros has the cosine 0 to any other."""

    def __init__(self, values: Tensor, norms: Tensor | None = None) -> None:
        if norms is None:  # some rows at a time, as they are copied to fp64
            norms = torch.empty(len(values), dtype=torch.float64, device=values.device)
            for part in _parts(len(values), max(1, PRODUCTS // max(1, values.shape[1]))):
                norms[part] = _sums(values[part].double().square()).sqrt_()
            norms = norms.where(norms > 0, 1)
        self.values, self.norms = values, norms

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: slice | Tensor) -> Vectors:
        return Vectors(self.values[index], self.norms[index])

    def unit(self, out: Tensor) -> Tensor:
        """Unit vectors [N, D], in the first N rows of `out`, fp32."""
        return torch.div(self.values, self.norms.to(self.values.dtype).unsqueeze(1), out=out[: len(self)])

    def double(self) -> Tensor:
        """Unit vectors, fp64."""
        return self.values.double() / self.norms.unsqueeze(-1)


def search(
    bank: Tensor,
    queries: Tensor,
    k: int,
    *,
    device: torch.device | None = None,
    rank: int = 0,
    world_size: int = 1,
    tile: tuple[int, int] = TILE,
) -> tuple[Tensor, Tensor]:
    """The k rows of the bank nearest to each query, the nearest first; of equally near ones the first of the bank.

    Equally near: with the same cosine to a step of 1 / GRID.

    Args:
        bank: [N, D], whole on every rank; lengths within the range of its type.
        queries: [Q, D], the same on every rank.
        k: in [1, N].
        device: where to compute; None: where the bank is.
        rank, world_size: this process among those that search a slice of the bank each; they all call this.
        tile: queries and rows compared at a time.

    Returns:
        cosines [Q, k] fp64 and rows [Q, k] int64, on the CPU, the same on every rank.
    """
    first, last = (len(bank) * r // world_size for r in (rank, rank + 1))
    device = device or bank.device
    asked = Vectors(queries.to(device))
    with torch.inference_mode(), full_precision():
        cosines, rows = _search(Vectors(bank[first:last].to(device)), asked, min(k, last - first), tile, rank == 0)
        if world_size == 1:
            return cosines.cpu(), rows.cpu()
        missing = (0, k - cosines.shape[1])  # in a slice of fewer than k rows
        cosines, rows = F.pad(cosines, missing, value=-torch.inf), F.pad(rows + first, missing)
        merged = [_over_ranks(cosines[part], rows[part], k, world_size) for part in _parts(len(queries), tile[0])]
        return torch.cat([c for c, _ in merged]), torch.cat([r for _, r in merged])


def nearest(similarities: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row, in falling order; of equal ones the first column comes first.

    Args:
        similarities: [Q, N].
        k: in [1, N].

    Returns:
        values [Q, k] and columns [Q, k].
    """
    values, columns = similarities.topk(min(k + 1, similarities.shape[1]), dim=1)
    # topk takes any of equal values. Inside the result a stable sort mends the order; where an equal was left
    # outside (the value after the last is the same), the row is sorted whole, which is rare.
    values, columns = _ordered(values, columns)
    if values.shape[1] > k:
        tied = (values[:, k - 1] == values[:, k]).nonzero().flatten()
        if len(tied):
            sorted_values, sorted_columns = similarities[tied].sort(dim=1, descending=True, stable=True)
            values[tied, :k], columns[tied, :k] = sorted_values[:, :k], sorted_columns[:, :k]
    return values[:, :k], columns[:, :k]


def _ordered(values: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Both [Q, C], by falling value and, of equal ones, rising column."""
    columns, by_column = columns.sort(dim=1)
    values, by_value = values.gather(1, by_column).sort(dim=1, descending=True, stable=True)
    return values, columns.gather(1, by_value)


def _parts(length: int, size: int) -> Iterator[slice]:
    return (slice(first, min(first + size, length)) for first in range(0, length, size))


def _search(bank: Vectors, queries: Vectors, k: int, tile: tuple[int, int], shown: bool) -> tuple[Tensor, Tensor]:
    """`search` of one slice of the bank, on the device where it is."""
    if not k:
        return queries.norms.new_zeros(len(queries), 0), torch.zeros(
            len(queries), 0, dtype=torch.int64, device=queries.norms.device
        )
    count = min(k + SPARE, len(bank))
    similarities, rows = _candidates(bank, queries, count, tile, shown)
    # Of a sum of D products in any order (Higham 2002, section 3.1), the rounding of unit vectors, and the grid's.
    width = bank.values.shape[1]
    error = (width + 8) * torch.finfo(torch.float32).eps / 2 + 1 / GRID
    cosines = torch.empty(len(queries), k, dtype=torch.float64, device=rows.device)
    found = torch.empty(len(queries), k, dtype=torch.int64, device=rows.device)
    doubtful = torch.zeros(len(queries), dtype=torch.bool, device=rows.device)
    for part in _parts(len(queries), tile[0]):
        values, columns = _nearest_first(bank, queries[part], rows[part])
        cosines[part], found[part] = values[:, :k], columns[:, :k]
        if count < len(bank):
            doubtful[part] = values[:, k - 1] <= similarities[part, -1].double() + error
    if doubtful.any():
        again = doubtful.nonzero().flatten()
        chosen = _search_in_fp64(bank, queries[again], k, tile, shown)
        for part in _parts(len(again), tile[0]):
            cosines[again[part]], found[again[part]] = _nearest_first(bank, queries[again[part]], chosen[part])
    return cosines, found


def _candidates(
    bank: Vectors, queries: Vectors, count: int, tile: tuple[int, int], shown: bool
) -> tuple[Tensor, Tensor]:
    """The largest similarities in fp32, falling, and their rows, [Q, count] each; of equal ones any."""
    device = bank.values.device
    values = torch.full((len(queries), count), -torch.inf, device=device)
    rows = torch.zeros(len(queries), count, dtype=torch.int64, device=device)
    # Written over by each tile: fresh memory of this size would cost a page fault every 4 KiB.
    products = torch.empty(min(tile[0], len(queries)) * min(tile[1], len(bank)), device=device)
    unit = torch.empty(min(tile[1], len(bank)), bank.values.shape[1], device=device)
    asked = queries.unit(out=torch.empty(queries.values.shape, device=device))
    slices, parts = list(_parts(len(bank), tile[1])), list(_parts(len(queries), tile[0]))
    tiles = product(slices, parts)
    for here, part in track(tiles, label="neighbors", total=len(slices) * len(parts)) if shown else tiles:
        if part.start == 0:
            bank[here].unit(out=unit)
        shape = part.stop - part.start, here.stop - here.start
        similarities = torch.mm(asked[part], unit[: shape[1]].T, out=products[: shape[0] * shape[1]].view(shape))
        _offer(similarities, here.start, values[part], rows[part])
    return values, rows


def _offer(similarities: Tensor, first: int, values: Tensor, rows: Tensor) -> None:
    """Keeps the largest of those so far and of a tile.

    Args:
        similarities: [q, n] of the rows from `first` on.
        values, rows: the largest so far, [q, count], falling; changed in place.
    """
    count, size = values.shape[1], similarities.shape[1]
    blocks = F.pad(similarities, (0, -size % BLOCK), value=-torch.inf) if size % BLOCK else similarities
    blocks = blocks.view(len(values), -1, BLOCK)
    above = blocks.amax(2) > values[:, -1:]
    if above.sum() > DENSE * above.numel():
        more, columns = similarities.topk(min(count, size), dim=1)
    else:
        more, columns = _greater(blocks, above, values[:, -1])
    kept, order = torch.cat([values, more], 1).topk(count, dim=1)
    rows.copy_(torch.cat([rows, columns + first], 1).gather(1, order))
    values.copy_(kept)


def _greater(blocks: Tensor, above: Tensor, least: Tensor) -> tuple[Tensor, Tensor]:
    """What is greater than the query's `least`, as rectangles [q, most] filled up with -inf, and its columns.

    Args:
        blocks: [q, n / BLOCK, BLOCK].
        above: [q, n / BLOCK], the blocks with such a value.
        least: [q].
    """
    query, block = above.nonzero(as_tuple=True)
    inside = blocks[query, block]
    hit, offset = (inside > least[query].unsqueeze(1)).nonzero(as_tuple=True)
    query = query[hit]  # rising
    counts = query.bincount(minlength=len(least))
    place = torch.arange(len(query), device=query.device) - (counts.cumsum(0) - counts)[query]
    shape = len(least), int(counts.max())
    values = blocks.new_full(shape, -torch.inf)
    columns = torch.zeros(shape, dtype=torch.int64, device=query.device)
    values[query, place] = inside[hit, offset]
    columns[query, place] = block[hit] * BLOCK + offset
    return values, columns


def _nearest_first(bank: Vectors, queries: Vectors, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Compares each query with its `rows` of the bank, [q, C], and their cosines, the nearest first."""
    return _ordered(_cosines(bank, queries, rows), rows)


def _cosines(bank: Vectors, queries: Vectors, rows: Tensor) -> Tensor:
    """Returns the cosines of queries to their `rows` of the bank, [q, C], in fp64, whatever stands beside a pair."""
    cosines = torch.empty(rows.shape, dtype=torch.float64, device=rows.device)
    for part in _parts(len(rows), max(1, PRODUCTS // (rows.shape[1] * bank.values.shape[1]))):
        products = bank.values[rows[part]].double().mul_(queries.values[part].double().unsqueeze(1))
        cosines[part] = _sums(products).div_(bank.norms[rows[part]] * queries.norms[part].unsqueeze(1))
    return _on_grid(cosines)


def _sums(values: Tensor) -> Tensor:
    """Over the last dimension, [..., D] -> [...], written over: halves are added until one is left.

    `sum`, as a product does, adds in an order of its own for each shape and device.
    """
    width = values.shape[-1]
    while width > 1:
        half = (width + 1) // 2
        values[..., : width - half] += values[..., half:width]
        width = half
    return values[..., 0]


def _search_in_fp64(bank: Vectors, queries: Vectors, k: int, tile: tuple[int, int], shown: bool) -> Tensor:
    """Rows [q, k], by comparing each query with each row in fp64."""
    device = bank.values.device
    cosines = torch.full((len(queries), k), -torch.inf, dtype=torch.float64, device=device)
    rows = torch.zeros(len(queries), k, dtype=torch.int64, device=device)
    slices, parts = list(_parts(len(bank), max(1, tile[1] // 2))), list(_parts(len(queries), tile[0]))
    tiles = product(slices, parts)
    asked, unit = queries.double(), queries.norms[:0]
    label = f"neighbors in fp64, of {len(queries)} queries"
    for here, part in track(tiles, label=label, total=len(slices) * len(parts)) if shown else tiles:
        if part.start == 0:
            unit = bank[here].double()
        values, columns = nearest(_on_grid(asked[part] @ unit.T), min(k, len(unit)))
        # What was found before stands first, as its rows do in the bank; the sort keeps that order of equal ones.
        values, order = torch.cat([cosines[part], values], 1).sort(dim=1, descending=True, stable=True)
        cosines[part] = values[:, :k]
        rows[part] = torch.cat([rows[part], columns + here.start], 1).gather(1, order[:, :k])
    return rows


def _on_grid(cosines: Tensor) -> Tensor:
    return cosines.mul_(GRID).round_().div_(GRID)


def _over_ranks(cosines: Tensor, rows: Tensor, k: int, world_size: int) -> tuple[Tensor, Tensor]:
    """The k nearest of what each rank found in its slice, [q, k] each; on the CPU."""
    # Side by side in the order of ranks, which is that of the bank: a stable sort leaves equal ones in it.
    every, where = (
        gather_rows(part).view(world_size, *part.shape).transpose(0, 1).flatten(1) for part in (cosines, rows)
    )
    values, order = every.sort(dim=1, descending=True, stable=True)
    return values[:, :k].cpu(), where.gather(1, order[:, :k]).cpu()
