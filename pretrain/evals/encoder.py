"""The encoder that an evaluator receives: a module, and the preprocessing that belongs to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from data_pipeline.samples.preprocessing import Preprocessing
from pretrain.models.config import ModelConfig
from pretrain.models.folders import weights_sha256
from pretrain.recipe.recipe import Data


@dataclass(frozen=True)
class Encoder:
    """A frozen encoder and the preprocessing that belongs to it.

    Attributes:
        module: from normalized images [B, 3, S, S] to features [B, D].
        preprocessing: how images become its input, S x S pixels.
        tag: short name among the encoders of one run, for file names: encoder, step_00001000, random.
        description: where it comes from, for the report.
        run: the run's folder, where there is one; results are kept there.
        notes: what a reader of every report on it should know.
    """

    module: nn.Module
    preprocessing: Preprocessing
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
        return cls(
            module,
            data.preprocessing(model.judged_size),
            tag=tag,
            description={"architecture": model.name, **description},
            run=run,
        )

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    def described_preprocessing(self) -> dict[str, object]:
        """The preprocessing as a report has it."""
        return self.preprocessing.described()

    def weights_sha256(self) -> str:
        """Over parameters and buffers; no file layout enters it."""
        return weights_sha256(self.module)
