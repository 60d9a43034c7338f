"""What a checkpoint leaves for others: the encoder in timm's or open_clip's own layout, and its text tower."""

from __future__ import annotations

from pathlib import Path

from pretrain.checkpoints.checkpoint import module_state
from pretrain.models.config import Model, ModelConfig
from pretrain.models.encoder_folders import save_encoder
from pretrain.objectives.config import ImageTextConfig, ObjectiveConfig
from pretrain.recipe.recipe import Data


def export_encoder(model: ModelConfig, objective: ObjectiveConfig, data: Data, checkpoint: Path, folder: Path) -> None:
    """Writes the encoder of a complete checkpoint, out of its files, which were verified; moving averages first.

    Args:
        model: what was trained, of the run's recipe.
        objective: likewise.
        data: mean, standard deviation and view that belong to the encoder, of the same recipe.
        checkpoint: holds the weights.
        folder: takes the encoder.

    Raises:
        CheckpointError: it holds no such encoder.
    """
    if isinstance(objective, ImageTextConfig):
        from pretrain.models.tower_folders import save_towers  # open_clip takes seconds

        state = module_state(checkpoint, verified=True)
        towers = (objective.embed_dim, objective.text, objective.tokenizer)
        save_towers(folder, state, model, *towers, data.preprocessing(model.judged_size))
    else:
        assert isinstance(model, Model)  # or the objective could not have been built
        weights = module_state(checkpoint, "encoder.", verified=True)
        save_encoder(folder, weights, model, data.preprocessing(model.judged_size))
