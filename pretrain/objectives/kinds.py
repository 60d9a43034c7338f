"""From the groups of a recipe to an objective, by the table of kinds (config.py)."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from torch import nn

from data_pipeline.errors import InputError
from pretrain.models.config import Model, ModelConfig
from pretrain.models.encoders import build_encoder
from pretrain.objectives.config import KINDS, ObjectiveConfig
from pretrain.objectives.contract import Objective


def build_objective(model: ModelConfig, config: ObjectiveConfig) -> Objective:
    """An encoder and its objective on the CPU, initialized from torch's global seed.

    Raises:
        InputError: a model that cannot be built, or that the objective cannot train.
    """
    if config.builds_encoder:
        return _objective_class(config.kind)(model, config)
    if not isinstance(model, Model):
        raise InputError(
            where="model.library",
            expected=f"timm, as objective.kind {config.kind} trains one encoder",
            found=f"{model.library}, which has two towers",
        )
    return build_on(build_encoder(model), model.image_size, config)


def build_on(encoder: nn.Module, image_size: int, config: ObjectiveConfig) -> Objective:
    """An objective on an encoder that exists already, as each term of a sum is.

    Args:
        encoder: from images [B, 3, S, S].
        image_size: S, pixels.
        config: of a kind that does not build its encoder itself.
    """
    return _objective_class(config.kind)(encoder, image_size, config)


def _objective_class(kind: str) -> Callable[..., Objective]:
    """Imported when one is built: open_clip alone takes seconds, which other kinds need not wait for."""
    found: type[Objective] = getattr(import_module(f"pretrain.objectives.{kind}.objective"), KINDS[kind])
    return found
