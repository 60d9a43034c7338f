"""What a checkpoint leaves for others: the encoder in timm's or open_clip's own layout, and its text tower."""

from __future__ import annotations

from pathlib import Path

from pretrain.checkpoints.checkpoint import module_state
from pretrain.models.config import Model
from pretrain.models.encoders import save_encoder
from pretrain.objectives.config import Clip, Siglip
from pretrain.recipe.recipe import Recipe


def export_encoder(recipe: Recipe, checkpoint: Path, folder: Path) -> None:
    """Writes the encoder of a complete checkpoint, out of its files, which were verified; moving averages first.

    Raises:
        CheckpointError: it holds no such encoder.
    """
    objective, data = recipe.objective, recipe.data
    if isinstance(objective, Clip | Siglip):
        from pretrain.models.tower_folders import save_towers  # open_clip takes seconds

        state = module_state(checkpoint, verified=True)
        towers = (objective.embed_dim, objective.text, objective.tokenizer)
        save_towers(folder, state, recipe.model, *towers, data.mean, data.std, data.views)
    else:
        assert isinstance(recipe.model, Model)  # or the objective could not have been built
        weights = module_state(checkpoint, "encoder.", verified=True)
        save_encoder(folder, weights, recipe.model, data.mean, data.std, data.views)
