"""The settings of a sample: the geometry and photometry of its views, how pairs are mixed, where its captions are.

Imports no torch.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from data_pipeline.settings import Group, Positive, Probability, Share, ordered

Interpolation = Literal["bilinear", "bicubic"]


class Views(Group):
    """Geometry of a training view (random crop, resize, flip) and an evaluation view (resize, center).

    The crop is a part of the image by `scale` and `ratio` (area), or the largest square that fits, moved along the
    longer side (square), as CLIP resizes the shorter side and moves a window.
    """

    crop: Literal["area", "square"] = "area"
    scale: Annotated[tuple[Share, Share], AfterValidator(ordered)] = (0.2, 1.0)  # of the image's area
    ratio: Annotated[tuple[Positive, Positive], AfterValidator(ordered)] = (0.75, 4 / 3)  # width / height
    flip: Probability = 0.5
    interpolation: Interpolation = "bicubic"  # filter of the antialiased resize
    eval_crop: Share = 1.0  # side of the center crop, as a share of the resized shorter side

    @model_validator(mode="after")
    def _one_geometry(self) -> Views:
        usual = {name: Views.model_fields[name].default for name in ("scale", "ratio")}
        other = [name for name, value in usual.items() if getattr(self, name) != value]
        if self.crop == "square" and other:
            raise ValueError(
                f"expected no {' or '.join(other)} beside crop square, which takes the largest square of every image, "
                f"found {', '.join(f'{name} {list(getattr(self, name))}' for name in other)}."
            )
        return self


class RandAugment(Group):
    """RandAugment as timm has it: any of its 15 operations at each layer; the defaults are rand-m9-mstd0.5-inc1."""

    num_ops: int = Field(2, ge=1)  # layers
    magnitude: float = Field(9.0, ge=0, le=10)
    magnitude_std: float = Field(0.5, ge=0)  # of the normal noise on the magnitude, drawn anew for each layer
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
    """Gaussian blur whose standard deviation is uniform in `sigma`."""

    probability: Probability
    sigma: Annotated[tuple[Positive, Positive], AfterValidator(ordered)] = (0.1, 2.0)  # pixels


class Erasing(Group):
    """A box of normal noise (pixel), or of the mean color (const), after normalization."""

    probability: Probability
    mode: Literal["pixel", "const"] = "pixel"
    area: Annotated[tuple[Share, Share], AfterValidator(ordered)] = (0.02, 1 / 3)  # of the view's
    aspect: Share = 0.3  # least height / width; the greatest is its inverse


class Augmentation(Group):
    """Photometry of a view, in the order in which it is applied; a plain number is a probability."""

    rand_augment: RandAugment | None = None
    jitter: Jitter | None = None
    grayscale: Probability = Field(0.0, serialization_alias="grey")
    blur: Blur | None = None
    solarize: Probability = Field(0.0, serialization_alias="solarise")
    erasing: Erasing | None = None


class Mixing(Group):
    """Mixup and cutmix of neighboring pairs; each one's alpha of Beta(alpha, alpha), 0: off."""

    mixup: float = Field(0.0, ge=0, le=4)
    cutmix: float = Field(0.0, ge=0, le=4)
    probability: Probability = 1.0  # that a pair is mixed
    switch_probability: Probability = 0.5  # that it is by cutmix, where both are on


class Captions(Group):
    """Where captions are, for objectives that read them; of several of one image, each epoch draws one."""

    field: str = "txt"  # the member that holds them
    key: str | None = None  # of a JSON member: the entry that is the caption, or a list of them
    lines: bool = False  # of a text member: each line is a caption of its own

    @model_validator(mode="after")
    def _one_form(self) -> Captions:
        if self.key is not None and self.lines:
            raise ValueError("expected key (of a JSON member) or lines (of a text member), found both.")
        return self
