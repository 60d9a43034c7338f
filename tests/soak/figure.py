"""What was sampled of a run as one figure: each measure over the steps, a line for each process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tests.soak.sampler import Sample

MEASURES = {
    "pss": ("PSS, MB", 1e-6), "memory": ("memory of no file, MB", 1e-6), "files": ("open files", 1),
    "threads": ("threads", 1), "mappings": ("mappings", 1),
}  # fmt: skip


def draw(samples: Sequence[Sample], step_seconds: Mapping[int, float], path: Path) -> None:
    """Draws them into a PNG. Where a run was killed and went on, its lines go back."""
    figure = Figure(figsize=(14, 3 * 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(4, 2).flat
    names = dict.fromkeys(held.name for sample in samples for held in sample.processes)
    for (measure, (title, scale)), axis in zip(MEASURES.items(), axes, strict=False):
        for name in names:
            held = [(s.step, getattr(h, measure) * scale) for s in samples for h in s.processes if h.name == name]
            axis.plot(*zip(*held, strict=True), label=name, linewidth=0.7)
        axis.set_title(title)
    axes[0].legend(fontsize="small")
    counted = {"processes": [len(s.processes) for s in samples], "temporary files": [s.tempfiles for s in samples]}
    for (title, values), axis in zip(counted.items(), axes[len(MEASURES) :], strict=False):
        axis.plot([sample.step for sample in samples], values, linewidth=0.7)
        axis.set_title(title)
    axes[-1].plot(list(step_seconds), [1000 * seconds for seconds in step_seconds.values()], ".", markersize=2)
    axes[-1].set_title("time of a step, ms")
    for axis in axes:
        axis.set_ylim(bottom=0)
        axis.set_xlabel("step")
    figure.savefig(path, dpi=80)
