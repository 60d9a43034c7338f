"""Words that papers' numbers are written in, by the modules of objectives that hold their own."""

from __future__ import annotations

from typing import Any

IMAGENET, CIFAR10, PAIRS = 1_281_167, 50_000, 400_000_000  # samples

Numbers = dict[str, Any]

JITTER = {"probability": 0.8, "brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}
BLUR = (0.1, 2.0)
CLIP_PIXELS = {
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
}
CIFAR10_PIXELS = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616)}
HALVES = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
# CLIP's section 2.4: "a random square crop from resized images is the only data augmentation".
SQUARE = {"crop": "square", "scale": (0.2, 1.0), "flip": 0.0, "interpolation": "bicubic", "eval_crop": 1.0}
CLASSES: Numbers = {"kind": "supervised", "num_classes": 1000, "loss": "ce"}


def rand_augment(magnitude: float) -> Numbers:
    """timm's rand-mM-mstd0.5-inc1."""
    return {"num_ops": 2, "magnitude": magnitude, "magnitude_std": 0.5, "probability": 0.5, "increasing": True}
