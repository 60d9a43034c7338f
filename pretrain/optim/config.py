"""Groups of a recipe that say how weights move: optimizer, schedule, moving average. Imports no torch.

A new optimizer is a folder here, with its `config.py` and its `optimizer.py`, and a line in `KINDS`.
"""

from __future__ import annotations

from importlib import import_module
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from pretrain.recipe.base import Group, union_by_kind

Decay = Annotated[float, Field(ge=0, lt=1)]

# Each kind, which is also its folder's name: the name of its group in `config.py`. Messages list them in this order.
KINDS = {
    "adamw": "AdamW",
    "sgd": "Sgd",
    "lars": "Lars",
    "lamb": "Lamb",
    "lion": "Lion",
}
DEFAULT_KIND = "adamw"  # of a recipe that names none


class OptimConfig(Group):
    """An optimizer's group of a recipe: what every optimizer has, and what it declares that it needs.

    Biases, norms, timm's tokens and positions are never decayed.

    Attributes:
        kind: its name in the table; a literal in each subclass.
        update: what an element's step depends on: `elementwise`, on what the optimizer knows of this element, so that
            ZeRO may cut parameters anywhere; `norm per tensor`, also on norms over the whole parameter.
        has_fused: whether there is a form of it in one kernel (`engine.fused_adamw`).
    """

    update: ClassVar[Literal["elementwise", "norm per tensor"]] = "elementwise"
    has_fused: ClassVar[bool] = False

    kind: str
    base_lr: float = Field(gt=0)  # peak_lr = base_lr * global_size / lr_batch
    lr_batch: int | None = Field(256, ge=1)  # None: base_lr is the peak_lr
    layer_decay: float = Field(1.0, gt=0, le=1)  # learning rate of a layer, as a share of that of the layer above
    clip_norm: float | None = Field(None, gt=0)  # of the global gradient; None: no clipping
    if TYPE_CHECKING:
        weight_decay: float  # a key of each kind, with a default of its own

    def moments(self) -> tuple[str, ...]:
        """Names of the tensors of a parameter's shape that the optimizer keeps for each, which start at zero."""
        raise NotImplementedError


def config_class(kind: str) -> type[OptimConfig]:
    """The group of a recipe that belongs to a kind of the table."""
    found: type[OptimConfig] = getattr(import_module(f"pretrain.optim.{kind}.config"), KINDS[kind])
    return found


def config_classes() -> list[type[OptimConfig]]:
    """Those of all kinds, in the order of the table."""
    return [config_class(kind) for kind in KINDS]


class _Schedule(Group):
    """Linear warmup, then what the kind says. Exactly one of epochs, steps, samples says how long."""

    epochs: float | None = Field(None, gt=0, le=1e6)
    steps: int | None = Field(None, ge=1)
    samples: int | None = Field(None, ge=1)
    warmup: float = Field(0.05, ge=0, lt=1)  # share of the run

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        given = [key for key in ("epochs", "steps", "samples") if getattr(self, key) is not None]
        if len(given) != 1:
            fix = " Set those you do not want to null." if given else ""
            raise ValueError(
                f"expected exactly one of epochs, steps, samples, found {' and '.join(given) or 'none'}.{fix}"
            )
        return self


class Cosine(_Schedule):
    kind: Literal["cosine"] = "cosine"
    final_lr: float = Field(0.0, ge=0, le=1)  # as a share of peak_lr


class Steps(_Schedule):
    """The learning rate is multiplied by gamma at each milestone."""

    kind: Literal["step"]
    milestones: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = Field(min_length=1)  # shares of the run
    gamma: float = Field(0.1, gt=0, le=1)

    @model_validator(mode="after")
    def _ascending(self) -> Steps:
        given = [self.warmup, *self.milestones]
        if any(a >= b for a, b in pairwise(given)):
            raise ValueError(
                f"expected milestones that ascend from above warmup {self.warmup}, found {list(self.milestones)}."
            )
        return self


class Constant(_Schedule):
    kind: Literal["constant"]


if TYPE_CHECKING:
    Schedule = Cosine | Steps | Constant
else:
    Schedule = union_by_kind((Cosine, Steps, Constant), default="cosine")


class Ema(Group):
    """Moving average of the trained weights; evaluation and export take it in their place."""

    decay: float = Field(0.9999, gt=0, lt=1)  # per step
    warmup: bool = True  # min(decay, (1 + step) / (10 + step))
