"""What a report shows, as data: URIs: curves of a run, and pictures with what is said of them. Imports no torch."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from data_pipeline.datasets.dataset import Dataset

# Legible on white and on black alike, since an image does not know on which of them it is shown.
INK, _COLORS = "#808080", ("#3b82c4", "#e08214")

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
class Neighbors:
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
    """Figures in a color that is legible on white and on black; `salt` makes their SVG the same each time."""
    colored = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    with rc_context({**dict.fromkeys(colored, INK), "font.size": 9, "svg.hashsalt": salt}):
        yield


def drawn(figure: Figure, caption: str) -> Picture:
    """As SVG, 100 pixels an inch."""
    file = io.BytesIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    width, height = (round(100 * inches) for inches in figure.get_size_inches())
    return Picture(_uri("image/svg+xml", file.getvalue()), width, height, caption)


def num_classes(dataset: Dataset) -> int:
    """0: it has no labels."""
    return 0 if dataset.label_counts is None or not dataset.label_counts.any() else len(dataset.label_counts)


def class_name(dataset: Dataset, label: int) -> str:
    if label < 0:
        return ""
    return dataset.classes[label] if dataset.classes is not None else f"class {label}"


def same_class(a: int, b: int) -> bool | None:
    return None if a < 0 or b < 0 else bool(a == b)


def picture(pixels: NDArray[np.uint8], caption: str = "", good: bool | None = None) -> Picture:
    """uint8 [H, W, 3] as PNG."""
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, "PNG", optimize=True)
    return Picture(_uri("image/png", file.getvalue()), pixels.shape[1], pixels.shape[0], caption, good)


def _uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
