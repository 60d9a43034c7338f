"""The encoder that an evaluator receives: a module, and the preprocessing that belongs to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from data_pipeline.samples.views import ViewSpec
from pretrain.models.config import ModelConfig
from pretrain.models.folders import weights_sha256
from pretrain.recipe.recipe import Data


@dataclass(frozen=True)
class Encoder:
    """A frozen encoder and the preprocessing that belongs to it.

    Attributes:
        module: from normalised images [B, 3, S, S] to features [B, D].
        image_size: S, pixels.
        mean: per channel, of images scaled to [0, 1].
        std: per channel, likewise.
        views: geometry of evaluation views (`interpolation`, `eval_crop`, `eval_resize`).
        tag: short name among the encoders of one run, for file names: encoder, step_00001000, random.
        description: where it comes from, for the report.
        run: the run's folder, where there is one; results are kept there.
        notes: what a reader of every report on it should know.
    """

    module: nn.Module
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    views: ViewSpec
    tag: str
    description: Mapping[str, object] = field(default_factory=dict)
    run: Path | None = None
    notes: tuple[str, ...] = ()

    @classmethod
    def of_recipe(
        cls,
        module: nn.Module,
        model: ModelConfig,
        data: Data,
        *,
        tag: str,
        run: Path | None,
        description: Mapping[str, object],
    ) -> Encoder:
        """An encoder that a run trained by these groups of its recipe, with their preprocessing."""
        views = data.views
        return cls(
            module,
            image_size=model.judged_size,
            mean=data.mean,
            std=data.std,
            views=ViewSpec(interpolation=views.interpolation, eval_crop=views.eval_crop),
            tag=tag,
            description={"architecture": model.name, **description},
            run=run,
        )

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    def preprocessing(self) -> dict[str, object]:
        return {
            "image_size": self.image_size,
            "resize": self.views.resizing,
            "interpolation": self.views.interpolation,
            "eval_crop": self.views.eval_crop,
            "mean": list(self.mean),
            "std": list(self.std),
        }

    def weights_sha256(self) -> str:
        """Over parameters and buffers; no file layout enters it."""
        return weights_sha256(self.module)
