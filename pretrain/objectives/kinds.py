"""From the groups of a recipe to an objective: the one `match` over the union."""

from __future__ import annotations

from typing import assert_never

from torch import nn

from data_pipeline.errors import InputError
from pretrain.models.config import Model, ModelConfig
from pretrain.models.encoders import build_encoder
from pretrain.objectives import config as recipe_objective
from pretrain.objectives.byol.objective import Byol
from pretrain.objectives.contract import Objective
from pretrain.objectives.mae.objective import Mae
from pretrain.objectives.simmim.objective import Simmim
from pretrain.objectives.simsiam.objective import SimSiam
from pretrain.objectives.sum.objective import Combined
from pretrain.objectives.supervised.objective import Supervised


def build_objective(model: ModelConfig, config: recipe_objective.ObjectiveConfig) -> Objective:
    """An encoder and its objective on the CPU, initialised from torch's global seed.

    Raises:
        InputError: a model that cannot be built, or that the objective cannot train.
    """
    if isinstance(config, recipe_objective.Clip | recipe_objective.Siglip):
        from pretrain.objectives.image_text import ImageText  # open_clip takes seconds, which others need not wait

        return ImageText(model, config)
    if not isinstance(model, Model):
        raise InputError(
            where="model.library",
            expected=f"timm, as objective.kind {config.kind} trains one encoder",
            found=f"{model.library}, which has two towers",
        )
    encoder = build_encoder(model)
    if isinstance(config, recipe_objective.Sum):
        terms = {str(term.objective.kind): _build(model, encoder, term.objective) for term in config.terms}
        return Combined(encoder, terms, {str(term.objective.kind): term.weight for term in config.terms})
    return _build(model, encoder, config)


def _build(model: Model, encoder: nn.Module, config: recipe_objective.Single) -> Objective:
    match config:
        case recipe_objective.Mae():
            return Mae(encoder, config)
        case recipe_objective.Simmim():
            return Simmim(encoder, config)
        case recipe_objective.Supervised():
            return Supervised(encoder, model.image_size, config)
        case recipe_objective.Byol():
            return Byol(encoder, model.image_size, config)
        case recipe_objective.SimSiam():
            return SimSiam(encoder, model.image_size, config)
        case _:
            assert_never(config)
