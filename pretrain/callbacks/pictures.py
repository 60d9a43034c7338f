"""What the model sees, and what it makes of it where it paints: a grid of a training batch's first samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from data_pipeline.batch import Batch
from data_pipeline.durable import durable_file
from pretrain.callbacks.callback import Periodic
from pretrain.engine.engine import Engine
from pretrain.monitoring.log import MetricLog
from pretrain.objectives.contract import Objective
from pretrain.objectives.masked import find_painter
from pretrain.runtime.state import RunState

NUM_SAMPLES = 8


class Pictures(Periodic):
    """Keeps the first samples of the latest batch, as the objective gets them, and paints them when due.

    Args:
        every_steps: steps between pictures.
        engine: holds the objective that paints.
        build: makes an objective with the same tensors.
        mean: per channel, by which the batch was normalized.
        std: likewise.
        log: takes the picture; it goes to `images/step_XXXXXXXX.png` in `out` as well.
        out: the run's folder.
    """

    def __init__(
        self,
        every_steps: int,
        engine: Engine,
        build: Callable[[], Objective],
        mean: Sequence[float],
        std: Sequence[float],
        log: MetricLog,
        out: Path,
    ) -> None:
        super().__init__(every_steps)
        self._engine, self._build, self._mean, self._std, self._log, self._out = engine, build, mean, std, log, out
        self._seen: Batch | None = None

    def on_batch(self, batch: Batch) -> None:
        """Remembers the first samples."""
        if self._engine.world.is_main:
            self._seen = replace(
                batch,
                keys=batch.keys[:NUM_SAMPLES],
                views=tuple(view[:NUM_SAMPLES].clone() for view in batch.views),
                labels=None,
                weights=None,
                tokens=None,
                masks=None if batch.masks is None else batch.masks[:NUM_SAMPLES].clone(),
                augment={},
            )

    def evaluate(self, state: RunState) -> dict[str, float]:
        """Writes the picture; every rank calls it. Nothing of the training is touched, its random state least."""
        columns: Sequence[Tensor] = ()
        if find_painter(self._engine.objective) is not None:
            columns = self._reconstruction()
        elif self._seen is not None:
            columns = self._seen.views
        if self._engine.world.is_main:
            pixels = grid(columns, self._mean, self._std)
            path = self._out / "images" / f"step_{state.progress.step:08d}.png"
            self._log.keep(str(path), lambda: _write_png(path, pixels))
            self._log.picture(state.progress.step, "images", pixels)
        return {}

    def _reconstruction(self) -> Sequence[Tensor]:
        """The seen samples by a copy with the whole weights, on rank 0: at ZeRO 3 no rank has them."""
        objective = self._engine.whole_copy(self._engine.objective, self._build, where="the objective")
        if objective is None or self._seen is None:
            return ()
        painter = find_painter(objective.eval())
        assert painter is not None
        shown = painter.reconstruct(self._seen)
        return shown.original, shown.masked, shown.filled


def _write_png(path: Path, pixels: NDArray[np.uint8]) -> None:
    path.parent.mkdir(exist_ok=True)
    with durable_file(path) as file:
        Image.fromarray(pixels).save(file, "PNG")


def grid(columns: Sequence[Tensor], mean: Sequence[float], std: Sequence[float]) -> NDArray[np.uint8]:
    """Lays images out: [H, W, 3], a row for each sample, a column for each of the normalized [B, 3, S, S]."""
    rows = torch.cat([torch.cat(tuple(column), dim=1) for column in columns], dim=2).float().cpu()  # [3, B*S, V*S]
    pixels = rows * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)
    found: NDArray[np.uint8] = (pixels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    return found
