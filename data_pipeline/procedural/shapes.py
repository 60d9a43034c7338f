"""Scenes of colored shapes with captions that are true of them, and attribute pairs that train never shows.

A scene has one large shape and, mostly, one small one beside it. Its label is the large one's color and
shape; its caption names all there is: "a small red circle left of a large blue square". Some pairs of color
and shape (`HELD_OUT`) occur in the test split only, so that one can ask whether a model puts together what it
knows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw

from data_pipeline.procedural.image import Pixels, encode, generator, smooth_field
from data_pipeline.shards.write import Record

COLORS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 220),
    "yellow": (235, 215, 50),
    "purple": (145, 50, 170),
    "orange": (240, 140, 30),
    "cyan": (50, 200, 215),
    "pink": (245, 150, 190),
}
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "star")
PAIRS = tuple((color, shape) for color in COLORS for shape in SHAPES)
HELD_OUT = tuple(zip(COLORS, SHAPES, strict=False))  # each shape once, each in another color

_RADII = {"large": (0.22, 0.28), "small": (0.11, 0.14)}  # as a share of the image's side
_SUPERSAMPLING = 4
_ALONE = 0.2  # share of scenes with one shape only
_MARGIN = 0.02  # between shapes, and to the border


@dataclass(frozen=True)
class Thing:
    """One shape of a scene; x to the right, y down, all lengths as a share of the image's side."""

    size: str
    color: str
    shape: str
    x: float
    y: float
    radius: float

    @property
    def phrase(self) -> str:
        return f"a {self.size} {self.color} {self.shape}"


@dataclass(frozen=True)
class Shapes:
    """Scene number i of a split, `size` pixels square; JSON beside the image says where everything is."""

    split: str
    seed: int
    size: int

    @property
    def classes(self) -> list[str]:
        return [f"{color} {shape}" for color, shape in PAIRS]

    def produce(self, items: Sequence[int]) -> Iterator[Record]:
        pairs = [pair for pair in PAIRS if self.split != "train" or pair not in HELD_OUT]
        for i in items:
            rng = generator("shapes", self.split, self.seed, i)
            things = draw_scene(rng, pairs, first=pairs[i % len(pairs)])
            large = next(thing for thing in things if thing.size == "large")
            scene = {
                "things": [asdict(thing) for thing in things],
                "held_out": any((thing.color, thing.shape) in HELD_OUT for thing in things),
            }
            members = {
                "jpg": encode(render(things, self.size, rng)),
                "txt": caption(things).encode(),
                "cls": str(PAIRS.index((large.color, large.shape))).encode(),
                "json": json.dumps(scene).encode(),
            }
            yield f"shapes/{self.split}/{i:07d}", members


def draw_scene(rng: Generator, pairs: Sequence[tuple[str, str]], first: tuple[str, str]) -> list[Thing]:
    """One large thing of the pair `first` and perhaps a small one of another pair, in the caption's order."""
    if rng.random() < _ALONE:
        return [_place(rng, "large", *first)]
    others = [pair for pair in pairs if pair != first]
    other = others[rng.integers(len(others))]
    while True:
        things = [_place(rng, "large", *first), _place(rng, "small", *other)]
        if _apart(*things):
            return things if rng.random() < 0.5 else things[::-1]


def caption(things: Sequence[Thing]) -> str:
    """The sentence that is true of one or two things, the first as its subject."""
    if len(things) == 1:
        return things[0].phrase
    first, second = things
    return f"{first.phrase} {relation(first, second)} {second.phrase}"


def relation(first: Thing, second: Thing) -> str:
    """Where the first is as seen from the second: by the axis on which their centers are further apart."""
    dx, dy = first.x - second.x, first.y - second.y
    if abs(dx) > abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


def render(things: Sequence[Thing], size: int, rng: Generator) -> Pixels:
    """The scene over a soft gray background, [size, size, 3]."""
    gray = smooth_field(rng, size, 3).mean(axis=2, keepdims=True).repeat(3, axis=2)
    background = (60 + 120 * rng.random() + 60 * (gray - 0.5)).clip(0, 255).astype(np.uint8)
    large = size * _SUPERSAMPLING
    image = Image.fromarray(background).resize((large, large))
    draw = ImageDraw.Draw(image)
    for thing in things:
        color = np.clip(np.array(COLORS[thing.color]) + rng.integers(-15, 16, 3), 0, 255)
        points = [((thing.x + px) * large, (thing.y + py) * large) for px, py in outline(thing)]
        draw.polygon(points, fill=tuple(int(value) for value in color))
    return np.asarray(image.reduce(_SUPERSAMPLING))


def outline(thing: Thing) -> list[tuple[float, float]]:
    """The polygon of a thing around its center, within its radius."""
    r = thing.radius
    if thing.shape == "square":
        return _spikes([(r, math.pi / 4 + k * math.pi / 2) for k in range(4)])
    if thing.shape == "triangle":
        return _spikes([(r, -math.pi / 2 + k * 2 * math.pi / 3) for k in range(3)])
    if thing.shape == "diamond":
        return [(0, -r), (0.6 * r, 0), (0, r), (-0.6 * r, 0)]
    if thing.shape == "cross":
        w, arm = 0.3 * r, 0.95 * r
        corner = [(-w, -arm), (w, -arm), (w, -w)]
        return [p for k in range(4) for p in (_quarter_turns(q, k) for q in corner)]
    if thing.shape == "star":
        return _spikes([(r if k % 2 == 0 else 0.4 * r, -math.pi / 2 + k * math.pi / 5) for k in range(10)])
    return _spikes([(r, k * 2 * math.pi / 48) for k in range(48)])


def _spikes(polar: list[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(r * math.cos(angle), r * math.sin(angle)) for r, angle in polar]


def _quarter_turns(point: tuple[float, float], times: int) -> tuple[float, float]:
    x, y = point
    for _ in range(times):
        x, y = -y, x
    return x, y


def _place(rng: Generator, size: str, color: str, shape: str) -> Thing:
    radius = float(rng.uniform(*_RADII[size]))
    low, high = radius + _MARGIN, 1 - radius - _MARGIN
    x, y = (round(float(value), 4) for value in rng.uniform(low, high, 2))
    return Thing(size, color, shape, x, y, round(radius, 4))


def _apart(first: Thing, second: Thing) -> bool:
    """They do not touch, and one axis is clearly the longer one, so that the caption is beyond doubt."""
    dx, dy = abs(first.x - second.x), abs(first.y - second.y)
    gap = math.hypot(dx, dy) - first.radius - second.radius
    return gap > _MARGIN and max(dx, dy) > 1.3 * min(dx, dy)
