"""What a report shows, as data: URIs: curves of a run, and pictures with what is said of them. Imports no torch."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from data_pipeline.datasets.dataset import Dataset
from data_pipeline.glyphs import FAMILY, in_fonts
from data_pipeline.messages import visible

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


def curve(
    title: str, series: Sequence[Series], *, from_zero: bool = True, lines: Mapping[str, float] = MappingProxyType({})
) -> Picture:
    """Lines over steps, drawn for a phone's width.

    Args:
        title: what is drawn, with its unit.
        series: at most as many as there are colors.
        from_zero: whether the axis begins there; else at what comes after the first tenth of the steps.
        lines: values that are the same at all steps, such as chance, by their names: dashed.
    """
    with in_ink(title, [title, *lines, *(name for name, *_ in series)]):
        figure = Figure(figsize=(4, 2.4), layout="constrained")
        axes = figure.add_subplot(xlabel="step")
        axes.set_title(figure_text(title), fontsize=9)
        handles = []
        for (name, steps, values), color in zip(series, _COLORS, strict=False):
            marker = "o" if len(steps) < 12 else ""
            handles += axes.plot(steps, values, color=color, label=name, marker=marker, markersize=3, linewidth=1.5)
        for value, style in zip(lines.values(), (":", "--"), strict=False):
            handles.append(axes.axhline(value, color=INK, linestyle=style, linewidth=1.2))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color=INK, alpha=0.25)
        if from_zero:
            axes.set_ylim(bottom=0)
        elif (limits := _settled(series)) is not None:
            axes.set_ylim(*limits)
        if len(handles) > 1:
            add_legend(axes, handles, [name for name, *_ in series] + list(lines))
        return drawn(figure, title)


def _settled(series: Sequence[Series]) -> tuple[float, float] | None:
    """Limits of an axis that shows all but the beginning, where that alone would take most of it; None: it does not."""
    last = max((max(steps, default=0.0) for _, steps, _ in series), default=0.0)
    pairs = [(step, value) for _, steps, values in series for step, value in zip(steps, values, strict=True)]
    pairs = [(step, value) for step, value in pairs if math.isfinite(value)]
    later = [value for step, value in pairs if step > 0.1 * last]
    if len(later) < 5:
        return None
    low, high = min(later), max(later)
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    whole = max(value for _, value in pairs) - min(value for _, value in pairs)
    return (low - margin, high + margin) if whole > 2 * (high - low) else None


@contextmanager
def in_ink(salt: str, names: Iterable[str] = ()) -> Iterator[None]:
    """Figures in a color that is legible on white and on black, in which every text is text: `$` begins no formula.

    Args:
        salt: makes their SVG the same each time.
        names: out of data, that will be drawn as `figure_text` gives them.
    """
    colored = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    families = dict.fromkeys([FAMILY, *(run.family for name in names for run in in_fonts(name))])
    settings = {"font.family": [*families], "font.size": 9, "text.parse_math": False, "text.usetex": False}
    with rc_context({**dict.fromkeys(colored, INK), **settings, "svg.hashsalt": visible(salt)}):
        yield


def figure_text(name: str) -> str:
    """A name out of data for a figure: characters that no installed font has are escapes."""
    return "".join(run.text for run in in_fonts(name))


def add_legend(place: Axes | Figure, handles: Sequence[Any], names: Sequence[str], **how: Any) -> None:
    """A legend of these handles under names out of data; `how` is passed on to matplotlib.

    Written afterwards, as matplotlib leaves out what is called `_` and anything.
    """
    legend = place.legend(handles, [str(number) for number in range(len(handles))], frameon=False, **how)
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_text(figure_text(name))


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
