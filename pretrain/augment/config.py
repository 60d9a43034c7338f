"""The recipe's groups for photometry and mixing; what is done with them: augment.py."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from pretrain.recipe.base import Group, Positive, Probability, Share, ordered


class RandAugment(Group):
    """RandAugment as timm has it; the defaults are its rand-m9-mstd0.5-inc1."""

    num_ops: int = Field(2, ge=1)
    magnitude: float = Field(9.0, ge=0, le=10)
    magnitude_std: float = Field(0.5, ge=0)  # of the noise on the magnitude
    probability: Probability = 0.5  # that an operation is applied
    increasing: bool = True  # a higher magnitude always distorts more


class Jitter(Group):
    """Strengths s: factors are uniform in [max(0, 1 - s), 1 + s], hue in [-s, s] turns; the order is drawn."""

    probability: Probability
    brightness: float = Field(0.0, ge=0)
    contrast: float = Field(0.0, ge=0)
    saturation: float = Field(0.0, ge=0)
    hue: float = Field(0.0, ge=0, le=0.5)


class Blur(Group):
    probability: Probability
    sigma: Annotated[tuple[Positive, Positive], AfterValidator(ordered)] = (0.1, 2.0)  # pixels


class Erasing(Group):
    """A box of normal noise (pixel), or of the mean colour (const), after normalisation."""

    probability: Probability
    mode: Literal["pixel", "const"] = "pixel"
    area: Annotated[tuple[Share, Share], AfterValidator(ordered)] = (0.02, 1 / 3)  # of the view's
    aspect: Share = 0.3  # least height / width; the greatest is its inverse


class Augment(Group):
    """Photometry of a view, in the order in which it is applied; a plain number is a probability."""

    rand_augment: RandAugment | None = None
    jitter: Jitter | None = None
    grey: Probability = 0.0
    blur: Blur | None = None
    solarise: Probability = 0.0
    erasing: Erasing | None = None


class Mixing(Group):
    """Mixup and cutmix of neighbouring pairs; each one's alpha of Beta(alpha, alpha), 0: off."""

    mixup: float = Field(0.0, ge=0, le=4)
    cutmix: float = Field(0.0, ge=0, le=4)
    probability: Probability = 1.0  # that a pair is mixed
    switch_probability: Probability = 0.5  # that it is by cutmix, where both are on
