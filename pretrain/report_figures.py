"""What a report shows, as data: URIs: curves of a run, what the objective paints, and what an encoder finds alike."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from data_pipeline.batch import Batch, BatchSpec
from data_pipeline.loader import evaluation_batches
from data_pipeline.progress import track
from data_pipeline.read import Dataset
from data_pipeline.views import ViewSpec
from pretrain.augment import normalize
from pretrain.evals.encoder import Encoder
from pretrain.evals.neighbours import nearest
from pretrain.objectives.masked import Painter
from pretrain.recipe import Recipe

# Legible on white and on black alike, since an image does not know on which of them it is shown.
INK, _COLORS = "#808080", ("#3b82c4", "#e08214")
_BATCH_SIZE = 250

Series = tuple[str, Sequence[float], Sequence[float]]  # name, steps, values


@dataclass(frozen=True)
class Picture:
    """An image of the report.

    Attributes:
        source: data: URI.
        width, height: pixels.
        caption: in words; empty: none.
        good: whether what it shows is right; None: that is no question.
    """

    source: str
    width: int
    height: int
    caption: str = ""
    good: bool | None = None


@dataclass(frozen=True)
class Neighbours:
    """A query and the images nearest to it, by one or several encoders."""

    query: Picture
    found: dict[str, list[Picture]]  # by encoder, the nearest first


def curve(title: str, series: Sequence[Series], *, from_zero: bool = True) -> Picture:
    """Lines over steps, drawn for a phone's width."""
    with in_ink(title):
        figure = Figure(figsize=(4, 2.4), layout="constrained")
        axes = figure.add_subplot(title=title, xlabel="step")
        for (name, steps, values), color in zip(series, _COLORS, strict=False):
            marker = "o" if len(steps) < 12 else ""
            axes.plot(steps, values, color=color, label=name, marker=marker, markersize=3, linewidth=1.5)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color=INK, alpha=0.25)
        if from_zero:
            axes.set_ylim(bottom=0)
        if len(series) > 1:
            axes.legend(frameon=False)
        return drawn(figure, title)


@contextmanager
def in_ink(salt: str) -> Iterator[None]:
    """Figures in a colour that is legible on white and on black; `salt` makes their SVG the same each time."""
    colored = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    with rc_context({**dict.fromkeys(colored, INK), "font.size": 9, "svg.hashsalt": salt}):
        yield


def drawn(figure: Figure, caption: str) -> Picture:
    """As SVG, 100 pixels an inch."""
    file = io.BytesIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    width, height = (round(100 * inches) for inches in figure.get_size_inches())
    return Picture(_uri("image/svg+xml", file.getvalue()), width, height, caption)


def reconstructions(painter: Painter, dataset: Dataset, recipe: Recipe, num_images: int) -> list[list[Picture]]:
    """Rows of an original, what is left of it, and what the model makes of that.

    Args:
        painter: with the weights of the run, on the CPU.
        dataset: whose first images are taken; their masks depend on their keys alone.
        recipe: of the run.
        num_images: rows.
    """
    batches = evaluation_batches(
        dataset,
        painter.needs,
        ViewSpec(**recipe.data.views.model_dump()),
        batch_size=num_images,
        max_pixels=recipe.data.max_pixels,
        limit=num_images,
    )
    batch = normalize(next(batches), recipe.data.mean, recipe.data.std)
    shown = painter.eval().reconstruct(batch)
    columns = [
        [picture(_pixels(image, recipe.data.mean, recipe.data.std)) for image in images]
        for images in (shown.original, shown.masked, shown.filled)
    ]
    return [list(row) for row in zip(*columns, strict=True)]


def neighbours(
    encoders: dict[str, Encoder],
    bank: Dataset,
    queries: Dataset,
    *,
    num_queries: int,
    bank_size: int,
    k: int,
    max_pixels: int,
) -> list[Neighbours]:
    """The k images of `bank` nearest to queries, by the cosine of their features.

    Args:
        encoders: by name, each on its device.
        bank, queries: data sets, with labels or without.
        num_queries: taken from the first queries, at equal distances.
        bank_size: the first images only.
    """
    chosen = np.linspace(0, min(queries.num_samples, 10 * num_queries) - 1, num_queries).round().astype(int)
    found: list[dict[str, list[Picture]]] = [{} for _ in chosen]
    asked: list[Picture] = []
    for name, encoder in encoders.items():
        pool = _look(encoder, bank, bank_size, max_pixels, f"neighbours: {name}")
        ask = _look(encoder, queries, int(chosen[-1]) + 1, max_pixels, f"queries: {name}").take(chosen)
        _, columns = nearest(F.normalize(ask.features, dim=1) @ F.normalize(pool.features, dim=1).T, k)
        asked = [picture(image, class_name(queries, y)) for image, y in zip(ask.images, ask.labels, strict=True)]
        for row, label, near in zip(found, ask.labels, columns, strict=True):
            row[name] = [
                picture(pool.images[j], class_name(bank, pool.labels[j]), same_class(label, pool.labels[j]))
                for j in near.tolist()
            ]
    return [Neighbours(query, row) for query, row in zip(asked, found, strict=True)]


@dataclass(frozen=True)
class _Looked:
    """N images as an encoder sees them: uint8 [N, H, W, 3], labels [N] (-1: none), features [N, D]."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    features: Tensor

    def take(self, rows: NDArray[np.int64]) -> _Looked:
        return _Looked(self.images[rows], self.labels[rows], self.features[rows])


def _look(encoder: Encoder, dataset: Dataset, limit: int, max_pixels: int, label: str) -> _Looked:
    labelled = dataset.label_counts is not None and bool(dataset.label_counts.any())
    spec = BatchSpec(
        encoder.image_size,
        num_classes=len(dataset.label_counts) if labelled and dataset.label_counts is not None else None,
    )
    batches: Iterator[Batch] = evaluation_batches(
        dataset, spec, encoder.views, batch_size=_BATCH_SIZE, max_pixels=max_pixels, limit=limit
    )
    images, labels, features = [], [], []
    encoder.module.eval()
    with torch.inference_mode():
        for batch in track(batches, label=label, total=-(-min(limit, dataset.num_samples) // _BATCH_SIZE)):
            images.append(batch.views[0].permute(0, 2, 3, 1).numpy())
            labels.append(batch.labels if batch.labels is not None else torch.full((len(batch),), -1))
            views = normalize(batch.to(encoder.device), encoder.mean, encoder.std).views
            features.append(encoder.module(views[0]).float().cpu())
    return _Looked(np.concatenate(images), torch.cat(labels).numpy(), torch.cat(features))


def class_name(dataset: Dataset, label: int) -> str:
    if label < 0:
        return ""
    return dataset.classes[label] if dataset.classes is not None else f"class {label}"


def same_class(a: int, b: int) -> bool | None:
    return None if a < 0 or b < 0 else bool(a == b)


def _pixels(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> NDArray[np.uint8]:
    """A normalised image [3, H, W] as uint8 [H, W, 3]."""
    scaled = image * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)
    pixels: NDArray[np.uint8] = (scaled * 255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
    return pixels


def picture(pixels: NDArray[np.uint8], caption: str = "", good: bool | None = None) -> Picture:
    """uint8 [H, W, 3] as PNG."""
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, "PNG", optimize=True)
    return Picture(_uri("image/png", file.getvalue()), pixels.shape[1], pixels.shape[0], caption, good)


def _uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
