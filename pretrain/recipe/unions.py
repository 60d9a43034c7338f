"""Groups of a recipe that are one of several kinds, all those of a table. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pretrain.evals import config as protocols
from pretrain.objectives import config as objectives
from pretrain.optim import config as optimizers
from pretrain.recipe.base import union_by_kind

if TYPE_CHECKING:
    AnyObjective = objectives.ObjectiveConfig
    AnyOptimizer = optimizers.OptimConfig
    AnyEvaluation = protocols.ProtocolConfig
else:
    AnyObjective = union_by_kind(objectives.config_classes())
    AnyOptimizer = union_by_kind(optimizers.config_classes(), default=optimizers.DEFAULT_KIND)
    AnyEvaluation = union_by_kind(protocols.config_classes())
