"""Fractals: attractors of iterated function systems, one class per system, so that labels are exact.

Anderson & Farrell 2022, "Improving Fractal Pre-training" (arXiv:2110.03091): a system is a handful of
contractive affine maps, drawn by their singular values so that most systems have a rich attractor; an image
is the density of the chaos game's points, colored, over a background. Here a class is one system; its
images differ by small changes of the maps, by rotation, mirroring, zoom and shift, and by colors and
background.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from data_pipeline.procedural.image import Pixels, encode, generator
from data_pipeline.shards.write import Record

Floats = NDArray[np.float64]
Points = NDArray[np.float32]  # [2, P]

_SYSTEMS_SEED = 2110_03091  # of the classes: the same in every dataset, so train and test agree
_PROBE_SIZE = 32
_OCCUPIED = (0.15, 0.60)  # share of pixels that a class's attractor covers: neither dust nor a blot

POINTS_PER_PIXEL = 10
_STEPS, _WARM_STEPS = 24, 8  # per chain; the first ones are not drawn, being the same for many chains


@dataclass(frozen=True)
class System:
    """N affine maps x -> R(theta) diag(s) R(phi) diag(signs) x + shift, each with singular values in [0,
    1]."""

    theta: Floats  # [N]
    phi: Floats  # [N]
    singular_values: Floats  # [N, 2], the larger first
    signs: Floats  # [N, 2]
    shift: Floats  # [N, 2]

    def maps(self) -> tuple[Floats, Floats]:
        """The maps' matrices, [N, 2, 2], and shifts, [N, 2]."""
        inner = self.singular_values[:, :, None] * rotation(self.phi) * self.signs[:, None, :]
        return rotation(self.theta) @ inner, self.shift


@dataclass(frozen=True)
class Fractals:
    """Images of class i % num_classes for sample number i, `size` pixels square."""

    split: str
    seed: int
    size: int
    num_classes: int

    @property
    def classes(self) -> list[str]:
        return [f"fractal {label}" for label in range(self.num_classes)]

    def produce(self, items: Sequence[int]) -> Iterator[Record]:
        for i in items:
            label = i % self.num_classes
            rng = generator("fractals", self.split, self.seed, i)
            image = encode(render(class_system(label), self.size, rng))
            yield f"fractals/{self.split}/{i:07d}", {"jpg": image, "cls": str(label).encode()}


@cache
def class_system(label: int) -> System:
    """The system of a class: the first one of its own random stream that covers a fair share of the image."""
    rng = np.random.default_rng([_SYSTEMS_SEED, label])
    while True:
        system = draw_system(rng)
        points = chaos_game(*system.maps(), POINTS_PER_PIXEL * _PROBE_SIZE**2, rng)
        occupied = (density(fit(points), _PROBE_SIZE) > 0).mean()
        if _OCCUPIED[0] <= occupied <= _OCCUPIED[1]:
            return system


def draw_system(rng: Generator) -> System:
    """A random system of 2 to 4 maps with the paper's constraint on its sigma-factor."""
    n = int(rng.integers(2, 5))
    sigma_factor = rng.uniform(0.5 * (5 + n), 0.5 * (6 + n))
    return System(
        theta=rng.uniform(0, 2 * np.pi, n),
        phi=rng.uniform(0, 2 * np.pi, n),
        singular_values=draw_singular_values(rng, n, sigma_factor),
        signs=rng.choice([-1.0, 1.0], (n, 2)),
        shift=rng.uniform(-1, 1, (n, 2)),
    )


def draw_singular_values(rng: Generator, n: int, sigma_factor: float) -> Floats:
    """n pairs in [0, 1], the larger first, with sum(larger + 2 smaller) = sigma_factor; [n, 2].

    One pair after the other, each within the bounds that leave the rest a solution, as in the paper.
    """
    values = np.empty((n, 2))
    left = sigma_factor  # what this pair and those after it have to add up to
    for k in range(n - 1):
        rest = 3 * (n - 1 - k)  # the most that the pairs after this one can add
        values[k, 0] = rng.uniform(max(0, (left - rest) / 3), min(1, left))
        left -= values[k, 0]
        values[k, 1] = rng.uniform(max(0, (left - rest) / 2), min(values[k, 0], left / 2))
        left -= 2 * values[k, 1]
    smaller = rng.uniform(max(0, (left - 1) / 2), left / 3)
    values[n - 1] = left - 2 * smaller, smaller
    return values


def vary(system: System, rng: Generator) -> System:
    """A system close by, for one image of the class; still contractive."""
    n = len(system.theta)
    return System(
        theta=system.theta + rng.normal(0, 0.06, n),
        phi=system.phi + rng.normal(0, 0.06, n),
        singular_values=system.singular_values * rng.uniform(0.95, 1.0, (n, 2)),
        signs=system.signs,
        shift=system.shift + rng.normal(0, 0.03, (n, 2)),
    )


def render(system: System, size: int, rng: Generator) -> Pixels:
    """One image of the system's class, [size, size, 3]."""
    matrices, shifts = vary(system, rng).maps()
    points = fit(chaos_game(matrices, shifts, POINTS_PER_PIXEL * size**2, rng))
    turn = rotation(np.array(rng.uniform(-1, 1))) * rng.choice([-1.0, 1.0], (1, 2))
    zoom = rng.uniform(0.6, 0.95)
    shift = rng.uniform(-0.5, 0.5, (2, 1)) * (1 - zoom)
    points = (zoom * turn).astype(np.float32) @ points + shift.astype(np.float32)
    counts = density(points, size)
    strength = np.log1p(counts) / np.log1p(counts.max())
    dark, bright = rng.uniform(0, 0.9, 3), rng.uniform(0.5, 1, 3)
    color = dark + (bright - dark) * strength[..., None]
    background = rng.random(3) * rng.uniform(0.3, 0.8)
    cover = np.minimum(1, 2 * strength)[..., None]
    image = background + (color - background) * cover
    pixels: Pixels = (image * 255).clip(0, 255).astype(np.uint8)
    return pixels


def chaos_game(matrices: Floats, shifts: Floats, num_points: int, rng: Generator) -> Points:
    """About `num_points` points of the attractor, [2, P].

    Many chains side by side, each from the fixed point of a map, which lies on the attractor. Maps are
    chosen in proportion to the area they keep, so that points spread evenly.
    """
    n = len(matrices)
    num_chains = -(-num_points // (_STEPS - _WARM_STEPS))
    areas = np.abs(np.linalg.det(matrices)) + 0.01  # a map that keeps no area still draws its line
    draws = rng.random((_STEPS, num_chains), np.float32)
    choice = np.searchsorted(np.cumsum(areas / areas.sum())[:-1], draws)
    table = np.concatenate([matrices.reshape(n, 4), shifts], axis=1).T.astype(np.float32).copy()
    fixed = np.linalg.solve(np.eye(2) - matrices, shifts[:, :, None])[:, :, 0].astype(np.float32)
    x, y = fixed[choice[0]].T
    path = np.empty((_STEPS, 2, num_chains), np.float32)
    for step in range(_STEPS):
        a, b, c, d, e, f = table[:, choice[step]]
        x, y = a * x + b * y + e, c * x + d * y + f
        path[step] = x, y
    return path[_WARM_STEPS:].transpose(1, 0, 2).reshape(2, -1)


def fit(points: Points) -> Points:
    """Moved and scaled, both ways alike, to lie in [-1, 1]."""
    low, high = points.min(axis=1, keepdims=True), points.max(axis=1, keepdims=True)
    fitted: Points = (points - (low + high) / 2) / max(float((high - low).max()) / 2, 1e-6)
    return fitted


def density(points: Points, size: int) -> NDArray[np.int64]:
    """How many points of [-1, 1]^2 fall into each pixel, [size, size]; points outside are not counted."""
    column, row = np.floor((points + 1) * np.float32(size / 2)).astype(np.int64)
    inside = (column >= 0) & (column < size) & (row >= 0) & (row < size)
    cells = (row * size + column)[inside]
    return np.bincount(cells, minlength=size * size).reshape(size, size)


def rotation(angle: Floats) -> Floats:
    """Rotation matrices, [..., 2, 2], of angles [...] in radians."""
    cosine, sine = np.cos(angle), np.sin(angle)
    return np.stack([np.stack([cosine, -sine], axis=-1), np.stack([sine, cosine], axis=-1)], axis=-2)
