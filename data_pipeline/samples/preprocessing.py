"""How an image becomes the input of an encoder that is judged: one value for whoever exports, loads or judges one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Resize = Literal["shorter", "square"]
Channels = tuple[float, float, float]


@dataclass(frozen=True)
class Preprocessing:
    """The resize, the center crop and the normalization of evaluation views, S x S pixels large.

    Attributes:
        image_size: S, pixels.
        mean: per channel (RGB), of images scaled to [0, 1].
        std: per channel, likewise, positive.
        interpolation: filter of the antialiased resize, bilinear or bicubic.
        eval_crop: side of the center crop, as a share of the resized shorter side.
        eval_resize: `shorter`: the shorter side is resized and the ratio kept; `square`: both sides are, which distorts
            what is not square.
    """

    image_size: int
    mean: Channels
    std: Channels
    interpolation: str = "bicubic"
    eval_crop: float = 1.0
    eval_resize: Resize = "shorter"

    def described(self) -> dict[str, object]:
        """The same for a report, as plain data."""
        sides = "the shorter side" if self.eval_resize == "shorter" else "both sides, to a square"
        # The words are those of results and of cached features as they always were, which go by them.
        return {
            "image_size": self.image_size,
            "resize": f"antialiased, of {sides}, then a centre crop",
            "interpolation": self.interpolation,
            "eval_crop": self.eval_crop,
            "mean": list(self.mean),
            "std": list(self.std),
        }
