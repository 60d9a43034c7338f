"""What a run trained, as evaluations judge it: its encoder, or its two towers, with the recipe's preprocessing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from pretrain.evals.encoder import Encoder
from pretrain.models.config import ModelConfig
from pretrain.models.encoders import build_encoder
from pretrain.objectives.config import ObjectiveConfig
from pretrain.recipe.files import load_recipe
from pretrain.recipe.recipe import Data

if TYPE_CHECKING:
    from pretrain.models.towers import Towers


@dataclass(frozen=True)
class TrainedRun:
    """A run, and the groups of its recipe that say what it trained.

    Attributes:
        folder: the run's folder.
        name: of the recipe.
        seed: from which its weights were initialized.
        model: the encoder, or both towers.
        objective: what it was trained for.
        data: the preprocessing, among other things.
    """

    folder: Path
    name: str
    seed: int
    model: ModelConfig
    objective: ObjectiveConfig
    data: Data

    @classmethod
    def load(cls, folder: Path) -> TrainedRun:
        """Reads what a run's folder says.

        Raises:
            InputError: its recipe is not there, or wrong.
        """
        recipe = load_recipe(folder / "recipe.yaml")
        return cls(folder, recipe.name, recipe.seed, recipe.model, recipe.objective, recipe.data)

    def build(self, judges: Literal["encoder", "towers"]) -> nn.Module:
        """A module with the tensors of what is judged, on the CPU, whose weights are to be loaded."""
        if judges == "encoder":
            return build_encoder(self.model)
        from pretrain.evals.sources.towers import build_towers  # open_clip takes seconds

        return build_towers(self)

    def judged(self, module: Any, tag: str, description: Mapping[str, object]) -> Encoder | Towers:
        """The encoder or the towers that a module of `build` is, with the recipe's preprocessing.

        Args:
            module: with its weights, on its device.
            tag: short name among those of the run, for file names.
            description: where it comes from, for a report.
        """
        description = {"source": str(self.folder), "kind": "run", "recipe": self.name, **description}
        if not hasattr(module, "text"):
            return Encoder.of_recipe(module, self.model, self.data, tag=tag, run=self.folder, description=description)
        from pretrain.evals.sources.towers import trained_towers

        return trained_towers(module.eval().requires_grad_(False), self, tag=tag, description=description)
