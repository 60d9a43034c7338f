"""What several encoders see in the same images: their nearest training images, and their features on two axes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from data_pipeline.batch import BatchSpec
from data_pipeline.errors import CheckpointError, InputError, PretrainError
from data_pipeline.loader import batches_of
from data_pipeline.progress import track
from data_pipeline.read import Dataset, open_dataset
from pretrain.augment import normalize
from pretrain.comparison_figures import draw_principal_axes
from pretrain.evals.base import EvalReport
from pretrain.evals.encoder import Encoder
from pretrain.evals.features import Features, full_precision, untouched
from pretrain.evals.neighbours import search
from pretrain.report_figures import Neighbours, Picture, class_name, picture, same_class

NUM_QUERIES, NUM_NEIGHBOURS, BANK_SIZE, NUM_POINTS = 6, 5, 1000, 400
_BATCH_SIZE, _THUMBNAIL, _MAX_PIXELS = 100, 64, 50_000_000

Load = Callable[[EvalReport], Encoder]  # the encoder that a report is of, on the device where it is to run


@dataclass(frozen=True)
class Looks:
    """Of one data set.

    Attributes:
        about: how many images were taken, in words.
        skipped: what is not shown, and why.
    """

    dataset: str
    about: str
    neighbours: list[Neighbours] = field(default_factory=list)
    axes: list[Picture] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Looked:
    """N images: thumbnails uint8 [H, W, 3], and their features."""

    images: list[NDArray[np.uint8]]
    features: Features


def look(dataset: str, by_encoder: Mapping[str, EvalReport], load: Load) -> Looks:
    """What the encoders of these reports, of one data set, see in some of its images; what cannot be shown is told."""
    arguments = next(iter(by_encoder.values())).arguments
    try:
        train, test = _opened(arguments.get("train")), _opened(arguments.get("test"))
    except PretrainError as error:
        return Looks(dataset, "", skipped=[f"neighbours and features: {error}"])
    if test is None:
        return Looks(dataset, "", skipped=["neighbours and features: the reports do not say where their images are"])
    about = [f"Features of {min(NUM_POINTS, test.num_samples):,} of {test.num_samples:,} test images"]
    if train is not None:
        pool_size = min(BANK_SIZE, train.num_samples)
        about.append(f"neighbours among {pool_size:,} of {train.num_samples:,} training images")
    shown = Looks(dataset, f"{', '.join(about)}, each at equal distances in their order.")
    queries = np.linspace(0, min(NUM_POINTS, test.num_samples) - 1, NUM_QUERIES).round().astype(int).tolist()
    rows: list[dict[str, list[Picture]]] = [{} for _ in queries]
    asked: list[Picture] = []
    for name, report in by_encoder.items():
        try:
            encoder = _same_weights(load(report), report)
            seen = _look(encoder, test, NUM_POINTS, f"{name}: features of {dataset}")
            shown.axes.append(_axes(name, seen, test))
            if train is not None:
                pool = _look(encoder, train, BANK_SIZE, f"{name}: neighbours in {dataset}")
                for row, near in zip(rows, _neighbours(seen, pool, queries, train), strict=True):
                    row[name] = near
                labels = seen.features.labels.tolist()
                asked = asked or [picture(seen.images[i], class_name(test, labels[i])) for i in queries]
        except (PretrainError, torch.OutOfMemoryError) as error:
            shown.skipped.append(f"neighbours and features of {name}: {error}")
    shown.neighbours.extend(Neighbours(query, row) for query, row in zip(asked, rows, strict=False))
    return shown


def _opened(path: object) -> Dataset | None:
    return open_dataset(str(path)) if path is not None else None


def _axes(name: str, seen: _Looked, test: Dataset) -> Picture:
    classes = [class_name(test, label) for label in range(_num_classes(test))]
    return draw_principal_axes(name, seen.features.values.numpy(), seen.features.labels.numpy(), classes)


def _same_weights(encoder: Encoder, report: EvalReport) -> Encoder:
    source, judged, found = str(report.encoder.get("source")), report.weights_sha256, encoder.weights_sha256()
    if "encoder" not in report.arguments:
        raise InputError(
            source, "a result of the image encoder alone, such as kNN", f"{report.evaluator} of two towers"
        )
    if found != judged:
        raise CheckpointError(
            source, f"the weights that were judged ({judged[:12]})", f"others ({found[:12]})", "Judge it again."
        )
    return encoder


def _neighbours(seen: _Looked, pool: _Looked, queries: list[int], bank: Dataset) -> list[list[Picture]]:
    k = min(NUM_NEIGHBOURS, len(pool.images))
    _, columns = search(pool.features.values, seen.features.values[queries], k)
    labels, known = seen.features.labels[queries].tolist(), pool.features.labels.tolist()
    return [
        [picture(pool.images[j], class_name(bank, known[j]), same_class(label, known[j])) for j in near.tolist()]
        for label, near in zip(labels, columns, strict=True)
    ]


def _num_classes(dataset: Dataset) -> int:
    return 0 if dataset.label_counts is None or not dataset.label_counts.any() else len(dataset.label_counts)


def _look(encoder: Encoder, dataset: Dataset, num_images: int, label: str) -> _Looked:
    """Images at equal distances in the data set's order, since that may be by class."""
    spec = BatchSpec(encoder.image_size, num_classes=_num_classes(dataset) or None)
    chosen = range(0, dataset.num_samples, max(1, dataset.num_samples // num_images))[:num_images]
    pieces = [chosen[start : start + _BATCH_SIZE] for start in range(0, len(chosen), _BATCH_SIZE)]
    batches = batches_of(dataset, spec, encoder.views, pieces, max_pixels=_MAX_PIXELS)
    images: list[NDArray[np.uint8]] = []
    values, labels = [], []
    keys: list[str] = []
    with untouched(encoder.module), full_precision():
        for batch in track(batches, label=label, total=len(pieces)):
            images += [_thumbnail(pixels) for pixels in batch.views[0].permute(0, 2, 3, 1).numpy()]
            views = normalize(batch.to(encoder.device), encoder.mean, encoder.std).views
            values.append(encoder.module(views[0]).float().cpu())
            labels.append(batch.labels if batch.labels is not None else torch.full((len(batch),), -1))
            keys += batch.keys
    return _Looked(images, Features(torch.cat(values), torch.cat(labels), tuple(keys)))


def _thumbnail(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    image = Image.fromarray(np.ascontiguousarray(pixels))
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    return np.asarray(image)
