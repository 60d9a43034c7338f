"""Some images of a data set as an encoder sees them, and which of them are nearest to others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from data_pipeline.batch import BatchSpec
from data_pipeline.datasets.dataset import Dataset
from data_pipeline.loader import batches_of
from data_pipeline.order.spread import spread_over
from data_pipeline.progress import track
from pretrain.augment.augment import normalize
from pretrain.evals.encoder import Encoder
from pretrain.evals.features.extract import Features, full_precision, untouched
from pretrain.evals.features.neighbors import search
from pretrain.reports.report_figures import Neighbors, Picture, class_name, num_classes, picture, same_class

_BATCH_SIZE, _THUMBNAIL = 100, 64


@dataclass(frozen=True)
class SampleImages:
    """N images: thumbnails uint8 [H, W, 3], and their features."""

    images: list[NDArray[np.uint8]]
    features: Features


def look_at(encoder: Encoder, dataset: Dataset, num_images: int, *, max_pixels: int, label: str) -> SampleImages:
    """Images from all over the data set's order, since that may be by class.

    Args:
        num_images: all of them where there are fewer.
        label: of the progress line.
    """
    chosen = spread_over(dataset.num_samples, num_images)
    pieces = [chosen[start : start + _BATCH_SIZE] for start in range(0, len(chosen), _BATCH_SIZE)]
    spec = BatchSpec(encoder.preprocessing.image_size, num_classes=num_classes(dataset) or None)
    batches = batches_of(dataset, spec, encoder.preprocessing, pieces, max_pixels=max_pixels)
    images: list[NDArray[np.uint8]] = []
    values, labels = [], []
    keys: list[str] = []
    with untouched(encoder.module), full_precision():
        for batch in (batch.kept() for batch in track(batches, label=label, total=len(pieces))):
            if not len(batch):
                continue
            images += [_thumbnail(pixels) for pixels in batch.views[0].permute(0, 2, 3, 1).numpy()]
            pixels = encoder.preprocessing
            views = normalize(batch.to(encoder.device), pixels.mean, pixels.std).views
            values.append(encoder.module(views[0]).float().cpu())
            labels.append(batch.labels if batch.labels is not None else torch.full((len(batch),), -1))
            keys += batch.keys
    return SampleImages(images, Features(torch.cat(values), torch.cat(labels), tuple(keys)))


def numbered_as(seen: SampleImages, dataset: Dataset, bank: Dataset) -> SampleImages:
    """The same images of `dataset` with their labels as `bank` numbers its classes, by the names of these.

    A class that `bank` lacks has a number of none of its own; where one of the two sets alone has names, nobody knows
    which numbers mean the same, and there are no labels (-1).
    """
    labels, names, known = seen.features.labels, dataset.classes, bank.classes
    if names == known:
        return seen
    if not names or not known:
        return replace(seen, features=replace(seen.features, labels=torch.full_like(labels, -1)))
    place = {name: number for number, name in enumerate(known)}
    numbers = torch.tensor([place.get(name, len(known) + number) for number, name in enumerate(names)])
    renumbered = torch.where(labels < 0, labels, numbers[labels.clamp(min=0)])
    return replace(seen, features=replace(seen.features, labels=renumbered))


def nearest_pictures(
    seen: SampleImages, queries: Sequence[int], pool: SampleImages, bank: Dataset, k: int
) -> list[list[Picture]]:
    """For each query, a row of `seen`, the k of `pool`, images of `bank`, that are nearest by cosine, nearest first.

    Labels of `seen` are numbered as those of `bank` (`numbered_as`).
    """
    _, columns = search(pool.features.values, seen.features.values[queries], min(k, len(pool.images)))
    labels, known = seen.features.labels[queries].tolist(), pool.features.labels.tolist()
    return [
        [picture(pool.images[j], class_name(bank, known[j]), same_class(label, known[j])) for j in near.tolist()]
        for label, near in zip(labels, columns, strict=True)
    ]


def shown(seen: SampleImages, queries: Sequence[int], dataset: Dataset) -> list[Picture]:
    labels = seen.features.labels.tolist()
    return [picture(seen.images[i], class_name(dataset, labels[i])) for i in queries]


@dataclass(frozen=True)
class NeighborSample:
    """Queries with their neighbors, and how often a neighbor is of its query's class.

    Attributes:
        shown: some of the queries, of as many classes as may be.
        k: neighbors of each.
        num_queries: over which hits were counted; 0: there are no labels.
        hits: by encoder, percent of the neighbors that are of the query's class.
        chance: percent of all that neighbors are taken from.
    """

    shown: list[Neighbors]
    k: int
    num_queries: int
    hits: dict[str, float]
    chance: float


def neighbours(
    encoders: Mapping[str, Encoder],
    bank: Dataset,
    queries: Dataset,
    *,
    num_queries: int,
    num_rated: int,
    bank_size: int,
    k: int,
    max_pixels: int,
) -> NeighborSample:
    """The k images of `bank` nearest to queries, by the cosine of their features.

    Args:
        encoders: by name, each on its device.
        bank, queries: data sets, with labels or without; of each so many, from all over it.
        num_queries: of those that are rated, shown.
        num_rated: queries over which hits are counted.
        bank_size: images that neighbors are taken from.
    """
    hits: dict[str, float] = {}
    chance, num_labeled = 0.0, 0
    rows: list[dict[str, list[Picture]]] = []
    asked: list[Picture] = []
    for name, encoder in encoders.items():
        pool = look_at(encoder, bank, bank_size, max_pixels=max_pixels, label=f"neighbors: {name}")
        seen = look_at(encoder, queries, max(num_queries, num_rated), max_pixels=max_pixels, label=f"queries: {name}")
        chosen = of_several_classes(seen.features.labels.tolist(), num_queries)
        asked, rows = shown(seen, chosen, queries), rows or [{} for _ in chosen]
        seen = numbered_as(seen, queries, bank)
        for row, near in zip(rows, nearest_pictures(seen, chosen, pool, bank, k), strict=True):
            row[name] = near
        same = _same_class(seen, pool)
        num_labeled = len(same)
        if num_labeled:
            labeled = seen.features.values[seen.features.labels >= 0]
            _, columns = search(pool.features.values, labeled, min(k, len(pool.images)))
            hits[name] = 100 * same.gather(1, columns.cpu()).double().mean().item()
            chance = 100 * same.double().mean().item()
    return NeighborSample(
        [Neighbors(query, row) for query, row in zip(asked, rows, strict=True)], k, num_labeled, hits, chance
    )


def of_several_classes(labels: Sequence[int], num: int) -> list[int]:
    """Indices of `num` of these, or of all: the first of each class, from all over the classes; then others.

    Args:
        labels: negative: none.
        num: how many.
    """
    first: dict[int, int] = {}
    for index, label in enumerate(labels):
        first.setdefault(label, index)
    firsts = [index for label, index in sorted(first.items()) if label >= 0]
    if len(firsts) >= num:
        return [firsts[i * len(firsts) // num] for i in range(num)]
    others = [index for index in range(len(labels)) if index not in firsts]
    more = min(num - len(firsts), len(others))
    return sorted([*firsts, *(others[i * len(others) // more] for i in range(more))])


def _same_class(seen: SampleImages, pool: SampleImages) -> Tensor:
    """Whether queries and the pool's images are of one class, [Q, N] bool; of queries that have a label."""
    labels = seen.features.labels
    return labels[labels >= 0].unsqueeze(1) == pool.features.labels.unsqueeze(0)


def _thumbnail(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    image = Image.fromarray(np.ascontiguousarray(pixels))
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    return np.asarray(image)
