"""A copy of what a run trains, in between its steps: its encoder, or its two towers, as protocols judge them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from pretrain.evals.encoder import Encoder
from pretrain.evals.sources.trained import TrainedRun
from pretrain.models.encoders import build_encoder

if TYPE_CHECKING:
    from pretrain.models.towers import Towers

Judges = Literal["encoder", "towers"]


def build_copy(run: TrainedRun, judges: Judges) -> nn.Module:
    """A module with the tensors of what is judged, on the CPU, whose weights are to be loaded."""
    if judges == "encoder":
        return build_encoder(run.model)
    from pretrain.evals.sources.towers import build_towers  # open_clip takes seconds

    return build_towers(run)


def judged_copy(
    run: TrainedRun, judges: Judges, module: Any, *, tag: str, description: Mapping[str, object]
) -> Encoder | Towers:
    """The encoder or the towers that a module of `build_copy` is, with the recipe's preprocessing.

    Args:
        run: that trains it.
        judges: what it is.
        module: with its weights, on its device.
        tag: short name among those of the run, for file names.
        description: when it was copied, for a report.
    """
    description = {"source": str(run.folder), "kind": "run", "recipe": run.name, **description}
    if judges == "encoder":
        return Encoder.of_recipe(module, run.model, run.data, tag=tag, run=run.folder, description=description)
    from pretrain.evals.sources.towers import trained_towers

    return trained_towers(module.eval().requires_grad_(False), run, tag=tag, description=description)
