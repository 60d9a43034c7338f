"""RandAugment's choices (Cubuk et al. 2019, arXiv:1909.13719), with timm's operations, ranges and magnitude noise."""

from __future__ import annotations

import math
from collections.abc import Iterator
from enum import IntEnum

from data_pipeline.samples.config import RandAugment

_MAX_MAGNITUDE = 10.0


class RandOp(IntEnum):
    """The operations, and what the argument of each is."""

    AUTO_CONTRAST = 0  # none
    EQUALIZE = 1  # none
    INVERT = 2  # none
    ROTATE = 3  # degrees counter-clockwise
    POSTERIZE = 4  # bits kept
    SOLARIZE = 5  # level from which pixels are inverted
    SOLARIZE_ADD = 6  # levels added to pixels below 128
    COLOR = 7  # factor, 1 changes nothing; so the next three
    CONTRAST = 8
    BRIGHTNESS = 9
    SHARPNESS = 10
    SHEAR_X = 11  # pixels to the side per pixel down
    SHEAR_Y = 12
    TRANSLATE_X = 13  # share of the width, of the height
    TRANSLATE_Y = 14


def draw_rand_augment(spec: RandAugment, draws: Iterator[float]) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Operation and argument of each layer; -1 and 0 where none is applied."""
    operations, arguments = [], []
    for _ in range(spec.num_ops):
        operation = RandOp(int(next(draws) * len(RandOp)))
        applied = next(draws) < spec.probability
        noise = math.sqrt(-2 * math.log(1 - next(draws))) * math.cos(2 * math.pi * next(draws))
        magnitude = min(_MAX_MAGNITUDE, max(0.0, spec.magnitude + spec.magnitude_std * noise))
        sign = -1 if next(draws) < 0.5 else 1
        operations.append(int(operation) if applied else -1)
        arguments.append(
            operation_argument(operation, magnitude / _MAX_MAGNITUDE, sign, spec.increasing) if applied else 0.0
        )
    return tuple(operations), tuple(arguments)


def operation_argument(operation: RandOp, level: float, sign: int, increasing: bool) -> float:
    """timm's ranges: the operation's argument at a level in [0, 1], to one side or the other where it has two."""
    match operation:
        case RandOp.ROTATE:
            return sign * 30 * level
        case RandOp.POSTERIZE:
            return max(1, 4 - int(4 * level) if increasing else int(4 * level))  # Pillow refuses to keep none
        case RandOp.SOLARIZE:
            return 256 - int(256 * level) if increasing else int(256 * level)
        case RandOp.SOLARIZE_ADD:
            return int(110 * level)
        case RandOp.COLOR | RandOp.CONTRAST | RandOp.BRIGHTNESS | RandOp.SHARPNESS:
            return max(0.1, 1 + sign * 0.9 * level) if increasing else 0.1 + 1.8 * level
        case RandOp.SHEAR_X | RandOp.SHEAR_Y:
            return sign * 0.3 * level
        case RandOp.TRANSLATE_X | RandOp.TRANSLATE_Y:
            return sign * 0.45 * level
        case _:
            return 0.0
