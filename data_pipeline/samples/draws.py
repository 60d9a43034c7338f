"""What is drawn for a sample's pixels after their geometry: parameters, to be shipped with it and applied later.

Pure functions of (seed, epoch, key, view). Each operation has a stream of its own, so turning one on leaves the
others' draws what they were. An operation that is drawn for a sample with a probability below 1 has neutral values
where it was not drawn; they are named below.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import permutations

from data_pipeline.order import keyed
from data_pipeline.samples.config import Augmentation, Blur, Erasing, Jitter, Mixing
from data_pipeline.samples.rand_augment import draw_rand_augment

Value = bool | int | float | tuple[int, ...] | tuple[float, ...]
Box = tuple[int, int, int, int]  # top, left, height, width, in pixels

NO_BOX: Box = (0, 0, 0, 0)
NOT_DRAWN = -1

_ORDERS = tuple(permutations(range(4)))
_TRIES = 10


def draw(spec: Augmentation, *, size: int, seed: int, epoch: int, key: str, view: int) -> dict[str, Value]:
    """Parameters of one view of one sample, named `<view>/<parameter>`; those of operations that are off are absent.

    - `rand_augment`: the operation (`RandOp`) at each layer, -1: none; `rand_augment_arguments`: of each.
    - `jitter_order`: which of brightness, contrast, saturation, hue (0..3) comes at each of four turns, -1: none;
      `jitter`: the factor of each of them, by its number.
    - `grayscale`, `solarize`: whether it is applied.
    - `blur`: sigma in pixels, 0: none.
    - `erasing`: top, left, height, width, all 0: none; `erasing_noise`: seed of what fills it, absent for a constant.
    """
    found: dict[str, Value] = {}

    def uniforms(purpose: str) -> Iterator[float]:
        return keyed.uniforms(purpose, seed, epoch, view, key)

    if spec.rand_augment is not None:
        operations, arguments = draw_rand_augment(spec.rand_augment, uniforms("rand_augment"))
        found |= {"rand_augment": operations, "rand_augment_arguments": arguments}
    if spec.jitter is not None:
        found["jitter_order"], found["jitter"] = _draw_jitter(spec.jitter, uniforms("jitter"))
    if spec.grayscale:
        found["grayscale"] = next(uniforms("grey")) < spec.grayscale  # a stream keeps the name that it is keyed by
    if spec.blur is not None:
        found["blur"] = _draw_blur(spec.blur, uniforms("blur"))
    if spec.solarize:
        found["solarize"] = next(uniforms("solarise")) < spec.solarize
    if spec.erasing is not None:
        found["erasing"] = _draw_box(spec.erasing, size, uniforms("erasing"))
        if spec.erasing.mode == "pixel":
            found["erasing_noise"] = int(keyed.words("erasing", seed, epoch, view, key, count=1)[0] >> 1)
    return {f"{view}/{name}": value for name, value in found.items()}


def _draw_jitter(spec: Jitter, draws: Iterator[float]) -> tuple[tuple[int, ...], tuple[float, ...]]:
    if next(draws) >= spec.probability:
        return (NOT_DRAWN,) * 4, (1.0, 1.0, 1.0, 0.0)
    order = _ORDERS[int(next(draws) * len(_ORDERS))]
    strengths = (spec.brightness, spec.contrast, spec.saturation, spec.hue)
    factors = [_between(max(0.0, 1 - s), 1 + s, next(draws)) for s in strengths[:3]]
    factors.append(_between(-spec.hue, spec.hue, next(draws)))
    return tuple(op if strengths[op] else NOT_DRAWN for op in order), tuple(factors)


def _draw_blur(spec: Blur, draws: Iterator[float]) -> float:
    return _between(*spec.sigma, next(draws)) if next(draws) < spec.probability else 0.0


def _draw_box(spec: Erasing, size: int, draws: Iterator[float]) -> Box:
    """As timm's `RandomErasing` (Zhong et al. 2017, arXiv:1708.04896, alg. 1): ten tries at a box that fits."""
    if next(draws) >= spec.probability:
        return NO_BOX
    for _ in range(_TRIES):
        area = size * size * _between(*spec.area, next(draws))
        ratio = math.exp(_between(math.log(spec.aspect), -math.log(spec.aspect), next(draws)))
        height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < height < size and 0 < width < size:
            top, left = int(next(draws) * (size - height + 1)), int(next(draws) * (size - width + 1))
            return top, left, height, width
    return NO_BOX


def draw_mix(spec: Mixing, *, size: int, seed: int, cursor: int, pair: int) -> dict[str, Value]:
    """How the two samples of a pair are mixed: a pure function of (seed, cursor of the step, number of the pair).

    - `mix/lam`: share of its own that each keeps, 1: not mixed.
    - `mix/box`: what each takes from the other whole (cutmix), all 0: none (mixup where lam is below 1).

    Mixup: Zhang et al. 2017 (arXiv:1710.09412), eq. 1. Cutmix: Yun et al. 2019 (arXiv:1905.04899), eqs. 1 and 2; lam
    is the share that is left outside the box after it was clipped, as in timm.
    """
    draws = keyed.uniforms("mix", seed, cursor, pair, "")
    cutmix = spec.mixup == 0 or (spec.cutmix > 0 and next(draws) < spec.switch_probability)
    alpha = spec.cutmix if cutmix else spec.mixup
    if alpha == 0 or next(draws) >= spec.probability:
        return {"mix/lam": 1.0, "mix/box": NO_BOX}
    lam = _beta(alpha, draws)
    if not cutmix:
        return {"mix/lam": lam, "mix/box": NO_BOX}
    top, left, height, width = _cut(size, lam, draws)
    return {"mix/lam": 1 - height * width / size**2, "mix/box": (top, left, height, width)}


def _cut(size: int, lam: float, draws: Iterator[float]) -> Box:
    """A square of (1 - lam) of the area about a uniform center, clipped."""
    side = int(size * math.sqrt(1 - lam))
    center = (int(next(draws) * size), int(next(draws) * size))
    top, left = (max(0, c - side // 2) for c in center)
    bottom, right = (min(size, c + (side + 1) // 2) for c in center)
    return top, left, bottom - top, right - left


def _beta(alpha: float, draws: Iterator[float]) -> float:
    """One draw of Beta(alpha, alpha) by Jöhnk's rejection, in logarithms, as powers of a small alpha underflow."""
    while True:
        x, y = (math.log(1 - next(draws)) / alpha for _ in range(2))
        top = max(x, y)
        log_sum = top + math.log(math.exp(x - top) + math.exp(y - top))
        if log_sum <= 0:
            return math.exp(x - log_sum)


def _between(low: float, high: float, draw: float) -> float:
    return low + (high - low) * draw
