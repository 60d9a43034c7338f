"""What several encoders see in the same images: their nearest training images, and their features on two axes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from data_pipeline.datasets.dataset import Dataset
from data_pipeline.datasets.read import open_dataset
from data_pipeline.errors import CheckpointError, InputError, PretrainError
from pretrain.evals.result import EvalReport
from pretrain.reports.comparison_figures import draw_principal_axes
from pretrain.reports.report_figures import Neighbors, Picture, class_name, num_classes

if TYPE_CHECKING:
    from pretrain.evals.encoder import Encoder
    from pretrain.reports.sample_images import SampleImages

NUM_QUERIES, NUM_NEIGHBOURS, BANK_SIZE, NUM_POINTS = 6, 5, 1000, 400
_MAX_PIXELS = 50_000_000

Load = Callable[[EvalReport], "Encoder"]  # the encoder that a report is of, on the device where it is to run


@dataclass(frozen=True)
class ImageComparison:
    """The images of one data set.

    Attributes:
        about: how many images were taken, in words.
        skipped: what is not shown, and why.
    """

    dataset: str
    about: str
    neighbours: list[Neighbors] = field(default_factory=list)
    axes: list[Picture] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


def look(dataset: str, by_encoder: Mapping[str, EvalReport], load: Load) -> ImageComparison:
    """What the encoders of these reports, of one data set, see in some of its images; what cannot be shown is told."""
    arguments = next(iter(by_encoder.values())).arguments
    try:
        train, test = _opened(arguments.get("train")), _opened(arguments.get("test"))
    except PretrainError as error:
        return ImageComparison(dataset, "", skipped=[f"neighbors and features: {error}"])
    if test is None:
        return ImageComparison(
            dataset, "", skipped=["neighbors and features: the reports do not say where their images are"]
        )
    import torch  # only where there are images: a comparison of numbers alone needs no model

    from pretrain.reports.sample_images import look_at, nearest_pictures, numbered_as, shown

    about = [f"Features of {min(NUM_POINTS, test.num_samples):,} of {test.num_samples:,} test images"]
    if train is not None:
        pool_size = min(BANK_SIZE, train.num_samples)
        about.append(f"neighbors among {pool_size:,} of {train.num_samples:,} training images")
    found = ImageComparison(dataset, f"{', '.join(about)}, each from all over their order.")
    rows: list[dict[str, list[Picture]]] = [{} for _ in range(NUM_QUERIES)]
    asked: list[Picture] = []
    for name, report in by_encoder.items():
        try:
            encoder = _same_weights(load(report), report)
            told = f"{name}: features of {dataset}"
            seen = look_at(encoder, test, NUM_POINTS, max_pixels=_MAX_PIXELS, label=told)
            found.axes.append(_axes(name, seen, test))
            if train is not None:
                told = f"{name}: neighbors in {dataset}"
                pool = look_at(encoder, train, BANK_SIZE, max_pixels=_MAX_PIXELS, label=told)
                queries = np.linspace(0, len(seen.images) - 1, NUM_QUERIES).round().astype(int).tolist()
                near_by = nearest_pictures(numbered_as(seen, test, train), queries, pool, train, NUM_NEIGHBOURS)
                for row, near in zip(rows, near_by, strict=True):
                    row[name] = near
                asked = asked or shown(seen, queries, test)
        except (PretrainError, torch.OutOfMemoryError) as error:
            found.skipped.append(f"neighbors and features of {name}: {error}")
    found.neighbours.extend(Neighbors(query, row) for query, row in zip(asked, rows, strict=False))
    return found


def _opened(path: object) -> Dataset | None:
    return open_dataset(str(path)) if path is not None else None


def _axes(name: str, seen: SampleImages, test: Dataset) -> Picture:
    classes = [class_name(test, label) for label in range(num_classes(test))]
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
