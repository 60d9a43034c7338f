"""Figures of a comparison: accuracy by class, what is taken for what, and features on two axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from pretrain.evals.result import Outcomes
from pretrain.reports.report_figures import INK, Picture, add_legend, drawn, figure_text, in_ink

# Told apart on white and on black, and by shape where colors are not seen.
COLORS = ("#3b82c4", "#e08214", "#2e9e5b", "#c94f7c", "#8a6fd1", "#a3872a", "#2aa3a3", "#d2543f", "#7a8b99", "#b07aa1")
MARKERS = "osD^vPX<>*"
MAX_CLASSES, MAX_WRITTEN, MAX_NAMED, MAX_COLORED = 20, 12, 40, 10
MAX_PAIRED = 1000  # classes of a matrix: with more, it would take gigabytes, and a pixel would stand for several


def class_accuracy(outcomes: Outcomes, num_classes: int) -> NDArray[np.float64]:
    """Percent of each class's samples that are right, [num_classes]; NaN where it has none."""
    total = np.bincount(outcomes.labels, minlength=num_classes)[:num_classes]
    right = np.bincount(outcomes.labels[outcomes.correct], minlength=num_classes)[:num_classes]
    shares: NDArray[np.float64] = np.divide(100.0 * right, total, out=np.full(num_classes, np.nan), where=total > 0)
    return shares


def confusion(outcomes: Outcomes, num_classes: int) -> NDArray[np.float64]:
    """Percent of row's samples that are taken for column, [num_classes, num_classes]; zeros where it has none."""
    counts = np.zeros((num_classes, num_classes))
    np.add.at(counts, (outcomes.labels, outcomes.predicted), 1)
    shares: NDArray[np.float64] = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    return shares


def draw_class_accuracy(title: str, by_encoder: Mapping[str, Outcomes], classes: Sequence[str]) -> Picture:
    """A row for each class; of many, those in which encoders differ most."""
    values = np.stack([class_accuracy(outcomes, len(classes)) for outcomes in by_encoder.values()])
    shown = np.flatnonzero(~np.isnan(values).any(axis=0))
    caption = title
    if len(shown) > MAX_CLASSES:
        widest = np.argsort(np.ptp(values[:, shown], axis=0), kind="stable")[::-1][:MAX_CLASSES]
        caption = f"{title}: the {MAX_CLASSES} of {len(shown)} classes in which encoders differ most"
        shown = np.sort(shown[widest])
    with in_ink(title, [*classes, *by_encoder]):
        figure = Figure(figsize=(4, 0.9 + 0.2 * len(shown) + 0.18 * -(-len(by_encoder) // 2)), layout="constrained")
        axes = figure.add_subplot(xlabel="%")
        rows = np.arange(len(shown))
        handles = []
        for index, row in enumerate(values):
            color, marker = _style(index)
            handles += axes.plot(row[shown], rows, linestyle="", markersize=5, alpha=0.85, color=color, marker=marker)
        axes.set_yticks(rows, [figure_text(_cut(classes[i])) for i in shown.tolist()])
        axes.set_ylim(len(shown) - 0.5, -0.5)
        axes.grid(color=INK, alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.axvline(100 / len(classes), color=INK, linestyle=":", linewidth=1.2)
        ncols = 2 if len(by_encoder) > 1 else 1
        add_legend(figure, handles, [*by_encoder], loc="outside upper center", ncols=ncols, fontsize=8)
        return drawn(figure, caption)


def draw_confusion(title: str, outcomes: Outcomes, classes: Sequence[str]) -> Picture:
    """Rows are true classes, columns what they are taken for, in percent of the row."""
    shares, n = confusion(outcomes, len(classes)), len(classes)
    with in_ink(title, classes):
        figure = Figure(figsize=(4, 4), layout="constrained")
        axes = figure.add_subplot(xlabel="taken for", ylabel="is")
        axes.imshow(shares, cmap="viridis", vmin=0, vmax=100)
        if n <= MAX_WRITTEN:
            for row, column in np.ndindex(n, n):
                light = "black" if shares[row, column] > 60 else "white"
                text = f"{shares[row, column]:.0f}"
                axes.text(column, row, text, ha="center", va="center", color=light, fontsize=7)
        if n <= MAX_NAMED:
            size = 8 if n <= MAX_WRITTEN else 5
            names = [figure_text(_cut(name, 12)) for name in classes]
            axes.set_xticks(range(n), names, rotation=90, fontsize=size)
            axes.set_yticks(range(n), names, fontsize=size)
        return drawn(figure, title)


def principal_axes(values: NDArray[np.float32]) -> tuple[NDArray[np.float64], tuple[float, float]]:
    """The first two principal components of features [N, D], and the shares of the variance that they hold.

    Each axis points to where its largest coordinate is positive, so that the same features give the same picture.
    """
    centred = values.astype(np.float64) - values.mean(axis=0, dtype=np.float64)
    left, scale, _ = np.linalg.svd(centred, full_matrices=False)
    points = np.zeros((len(values), 2))
    own = (left * scale)[:, :2]
    points[:, : own.shape[1]] = own * np.sign(own[np.abs(own).argmax(axis=0), np.arange(own.shape[1])])
    shares = np.zeros(2)
    shares[: own.shape[1]] = (scale**2 / max(float((scale**2).sum()), 1e-30))[:2]
    return points, (float(shares[0]), float(shares[1]))


def draw_principal_axes(
    title: str, values: NDArray[np.float32], labels: NDArray[np.int64], classes: Sequence[str]
) -> Picture:
    """Features [N, D] on their first two axes, colored by class; of many classes, the most frequent ones."""
    points, shares = principal_axes(values)
    present, counts = np.unique(labels[labels >= 0], return_counts=True)
    colored = np.sort(present[np.argsort(-counts, kind="stable")[:MAX_COLORED]])
    with in_ink(title, classes):
        figure = Figure(figsize=(4, 4.8), layout="constrained")
        axes = figure.add_subplot(xlabel=f"{100 * shares[0]:.0f} % of variance", ylabel=f"{100 * shares[1]:.0f} %")
        handles, names = [], []
        rest = ~np.isin(labels, colored)
        if rest.any():
            handles.append(axes.scatter(points[rest, 0], points[rest, 1], s=10, color=INK, alpha=0.3, linewidths=0))
            names.append("others")
        for index, label in enumerate(colored.tolist()):
            color, marker = _style(index)
            x, y = points[labels == label].T
            handles.append(axes.scatter(x, y, s=18, alpha=0.75, linewidths=0, color=color, marker=marker))
            names.append(_cut(classes[label]))
        axes.set_xticks([])
        axes.set_yticks([])
        if len(colored):
            add_legend(figure, handles, names, loc="outside lower center", ncols=3, fontsize=9, markerscale=1.5)
        return drawn(figure, title)


def _style(index: int) -> tuple[str, str]:
    return COLORS[index % len(COLORS)], MARKERS[index % len(MARKERS)]


def _cut(name: str, length: int = 18) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"
