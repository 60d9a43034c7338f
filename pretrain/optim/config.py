"""Groups of a recipe that say how weights move: optimizer, schedule, moving average. Imports no torch."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from pretrain.recipe.base import Group

Decay = Annotated[float, Field(ge=0, lt=1)]


class _Optimizer(Group):
    """What every optimizer has. Biases, norms, timm's tokens and positions are never decayed."""

    base_lr: float = Field(gt=0)  # peak_lr = base_lr * global_size / lr_batch
    lr_batch: int | None = Field(256, ge=1)  # None: base_lr is the peak_lr
    layer_decay: float = Field(1.0, gt=0, le=1)  # learning rate of a layer, as a share of that of the layer above
    clip_norm: float | None = Field(None, gt=0)  # of the global gradient; None: no clipping


class AdamW(_Optimizer):
    kind: Literal["adamw"] = "adamw"
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.05, ge=0)


class Sgd(_Optimizer):
    kind: Literal["sgd"]
    momentum: Decay = 0.9
    nesterov: bool = False
    weight_decay: float = Field(1e-4, ge=0)  # as an L2 penalty: part of the gradient

    @model_validator(mode="after")
    def _nesterov(self) -> Sgd:
        if self.nesterov and not self.momentum:
            raise ValueError("expected a momentum above 0 with nesterov, found 0.")
        return self


class Lars(_Optimizer):
    """What is not decayed is not adapted either, as in BYOL. ZeRO 0 only."""

    kind: Literal["lars"]
    momentum: Decay = 0.9
    eta: float = Field(1e-3, gt=0)  # of the trust ratio
    weight_decay: float = Field(1.5e-6, ge=0)  # as an L2 penalty


class Lamb(_Optimizer):
    """What is not decayed is not adapted either. ZeRO 0 only."""

    kind: Literal["lamb"]
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    eps: float = Field(1e-6, gt=0)
    weight_decay: float = Field(0.02, ge=0)


def _kind_or(default: str) -> Discriminator:
    """Recipes may leave the commonest kind out."""
    return Discriminator(lambda v: v.get("kind", default) if isinstance(v, dict) else getattr(v, "kind", default))


OptimConfig = Annotated[
    Annotated[AdamW, Tag("adamw")]
    | Annotated[Sgd, Tag("sgd")]
    | Annotated[Lars, Tag("lars")]
    | Annotated[Lamb, Tag("lamb")],
    _kind_or("adamw"),
]


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


Schedule = Annotated[
    Annotated[Cosine, Tag("cosine")] | Annotated[Steps, Tag("step")] | Annotated[Constant, Tag("constant")],
    _kind_or("cosine"),
]


class Ema(Group):
    """Moving average of the trained weights; evaluation and export take it in their place."""

    decay: float = Field(0.9999, gt=0, lt=1)  # per step
    warmup: bool = True  # min(decay, (1 + step) / (10 + step))
