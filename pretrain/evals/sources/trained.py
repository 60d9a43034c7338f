"""A run as evaluations know it: its folder, and the groups of its recipe that say what it trained."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from data_pipeline.datasets.training import open_training
from data_pipeline.errors import PretrainError
from pretrain.models.config import ModelConfig
from pretrain.objectives.config import ObjectiveConfig
from pretrain.recipe.files import load_recipe
from pretrain.recipe.recipe import Data
from pretrain.runtime.data_record import DataRecord


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

    def class_names(self, num_classes: int) -> tuple[str, ...] | None:
        """Names of the classes that the run learned, by label, [num_classes]; None: they are not known.

        An older run did not keep them, and its data are asked, if they are still there.
        """
        record = DataRecord.load(self.folder)
        try:
            names = record.classes if record is not None else open_training(self.data.train, self.data.cache).classes
        except PretrainError:
            return None
        return names if names is not None and len(names) == num_classes else None
