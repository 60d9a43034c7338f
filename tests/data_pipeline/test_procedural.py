"""Procedural images: the same for everybody, other in each split, and their labels and captions true."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits

from data_pipeline.errors import DataError
from data_pipeline.inspect.verify import verify
from data_pipeline.procedural import fractals, shapes
from data_pipeline.procedural.digits import Digits
from data_pipeline.procedural.fractals import Fractals
from data_pipeline.procedural.make import make
from data_pipeline.procedural.shapes import COLORS, HELD_OUT, Shapes
from tests.data_pipeline.archives import contents

KINDS = ("fractals", "shapes", "digits")


def pixels(record: tuple[str, Any]) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.asarray(Image.open(io.BytesIO(record[1]["jpg"])), dtype=np.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_result_depends_on_seed_and_split_and_not_on_processes(tmp_path: Path, kind: str) -> None:
    def made(name: str, **options: Any) -> dict[str, bytes]:
        manifest = make(kind, tmp_path / name, num_samples=30, size=16, shard_size=10, **options)
        assert manifest.total == 30
        return contents(tmp_path / name)

    one = made("one")
    assert made("again", workers=2 if kind == "shapes" else 0) == one
    others = [made("seed", seed=1), made("test", split="test")]
    for other in others:
        assert other.keys() == one.keys()
        assert all(other[name] != one[name] for name in one if name.endswith(".tar"))
    assert verify(str(tmp_path / "one")).faults == ()


def test_killed_making_goes_on(tmp_path: Path) -> None:
    options = {"num_samples": 30, "size": 16, "shard_size": 10}
    make("shapes", tmp_path / "out", **options)  # type: ignore[arg-type]
    whole = contents(tmp_path / "out")
    for name in ("manifest.json", "shard-000001.idx"):
        (tmp_path / "out" / name).unlink()
    with pytest.raises(DataError, match="size = 8"):
        make("shapes", tmp_path / "out", num_samples=30, size=8, shard_size=10)
    make("shapes", tmp_path / "out", **options)  # type: ignore[arg-type]
    assert contents(tmp_path / "out") == whole


@pytest.mark.parametrize(
    "wrong",
    [{"size": 4}, {"num_samples": 0}, {"seed": -1}, {"num_classes": 1}, {"split": "val"}, {"shard_size": 0}],
)
def test_wrong_arguments_make_nothing(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"--"):
        make("fractals", tmp_path / "out", **({"num_samples": 10, "size": 16} | wrong))
    with pytest.raises(DataError, match="kind"):
        make("cats", tmp_path / "out", num_samples=1, size=16)
    assert not (tmp_path / "out").exists()


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32), n=st.integers(2, 8))
def test_singular_values_have_the_sum_and_bounds_of_the_paper(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    sigma_factor = rng.uniform(0.5 * (5 + n), 0.5 * (6 + n))
    values = fractals.draw_singular_values(rng, n, sigma_factor)
    assert values.shape == (n, 2)
    assert (values >= 0).all()
    assert (values <= 1).all()
    assert (values[:, 0] >= values[:, 1] - 1e-12).all()
    assert np.isclose((values[:, 0] + 2 * values[:, 1]).sum(), sigma_factor)


def test_points_of_the_chaos_game_are_on_the_attractor() -> None:
    """The attractor is the union of its own images under the maps (Hutchinson)."""
    rng = np.random.default_rng(0)
    matrices, shifts = fractals.class_system(3).maps()
    points = fractals.chaos_game(matrices, shifts, 20_000, rng).T
    images = np.concatenate([points @ a.T + b for a, b in zip(matrices, shifts, strict=True)])
    scale = np.ptp(points, axis=0).max()
    for some, others in ((points[:200], images), (images[:: len(images) // 200], points)):
        distance = np.sqrt(((some[:, None] - others[None]) ** 2).sum(axis=2)).min(axis=1)
        assert distance.max() < 0.05 * scale


def test_density_counts_each_point_in_its_pixel() -> None:
    points = np.array([[-0.9, 0.1, 0.1, 0.99, 1.5], [-0.9, -0.9, -0.9, 0.99, 0.0]], dtype=np.float32)
    assert fractals.density(points, 2).tolist() == [[1, 2], [0, 1]]


def test_fractals_of_a_class_differ_but_are_alike() -> None:
    train = list(Fractals("train", 0, 32, 10).produce(range(400)))
    test = list(Fractals("test", 0, 32, 10).produce(range(100)))
    for i, (_, members) in enumerate(train):
        assert int(members["cls"]) == i % 10
    assert len({members["jpg"] for _, members in train + test}) == 500
    x, y = (np.stack([_normalised(pixels(record)) for record in part]) for part in (train, test))
    nearest = (y @ x.T).argmax(axis=1)
    accuracy = (nearest % 10 == np.arange(100) % 10).mean()
    assert 0.2 < accuracy < 0.9  # pixels alone say something of the class, and not all


def _normalised(image: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    grey = image.mean(axis=2).ravel()
    grey = grey - grey.mean()
    result: np.ndarray[Any, np.dtype[np.float64]] = grey / np.linalg.norm(grey)
    return result


def scenes(split: str, count: int = 300, size: int = 64) -> list[tuple[dict[str, Any], str, int, Any]]:
    """(scene, caption, label, image) of each sample."""
    return [
        (json.loads(m["json"]), m["txt"].decode(), int(m["cls"]), pixels((key, m)))
        for key, m in Shapes(split, 0, size).produce(range(count))
    ]


def test_captions_and_labels_are_true_of_the_scene() -> None:
    """Told again from the scene's own numbers, in another way than the captions are made."""
    classes = Shapes("test", 0, 64).classes
    relations: Counter[str] = Counter()
    for scene, caption, label, _ in scenes("test"):
        things = scene["things"]
        words = [f"a {thing['size']} {thing['color']} {thing['shape']}" for thing in things]
        large = [thing for thing in things if thing["size"] == "large"]
        assert len(large) == 1
        assert classes[label] == f"{large[0]['color']} {large[0]['shape']}"
        if len(things) == 1:
            assert caption == words[0]
            continue
        first, second = things
        dx, dy = first["x"] - second["x"], first["y"] - second["y"]
        angle = np.degrees(np.arctan2(-dy, dx)) % 360  # of the first as seen from the second, upwards
        where = ["right of", "above", "left of", "below"][int(((angle + 45) % 360) // 90)]
        relations[where] += 1
        assert caption == f"{words[0]} {where} {words[1]}"
        assert np.hypot(dx, dy) > first["radius"] + second["radius"]
    assert min(relations.values()) > 30
    assert len(relations) == 4


def test_things_are_seen_where_the_scene_says_in_their_color() -> None:
    for scene, _, _, image in scenes("train"):
        for thing in scene["things"]:
            x, y = round(thing["x"] * 64), round(thing["y"] * 64)
            seen = image[y - 1 : y + 2, x - 1 : x + 2].mean(axis=(0, 1))
            nearest = min(COLORS, key=lambda color: np.abs(seen - np.array(COLORS[color])).sum())
            assert nearest == thing["color"]


def test_shapes_fill_the_areas_that_they_should() -> None:
    shares = {"circle": np.pi, "square": 2.0, "triangle": 1.299, "diamond": 1.2, "cross": 1.92, "star": 1.176}
    for shape, share in shares.items():
        x, y = np.array(shapes.outline(shapes.Thing("large", "red", shape, 0.5, 0.5, 1.0))).T
        area = 0.5 * abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1)))
        assert np.isclose(area, share, rtol=0.01), shape
        assert np.hypot(x, y).max() < 1 + 1e-9


def test_held_out_pairs_are_in_test_only() -> None:
    assert len(HELD_OUT) == len(shapes.SHAPES)
    for split in ("train", "test"):
        held_out = 0
        for scene, _, label, _ in scenes(split):
            has = any((thing["color"], thing["shape"]) in HELD_OUT for thing in scene["things"])
            assert scene["held_out"] == has
            held_out += shapes.PAIRS[label] in HELD_OUT
        assert (held_out > 0) == (split == "test")


def test_digits_are_the_real_ones_each_in_one_split() -> None:
    images, labels = load_digits(return_X_y=True)
    seen = []
    for split, count in (("train", 1437), ("test", 360)):
        for key, members in Digits(split, 0, 32).produce(range(count)):
            number = int(key.rpartition("/")[2])
            seen.append(number)
            assert int(members["cls"]) == labels[number]
            if number % 50 == 0:
                small = pixels((key, members)).mean(axis=2).reshape(8, 4, 8, 4).mean(axis=(1, 3))
                assert np.corrcoef(small.ravel(), images[number])[0, 1] > 0.95
    assert sorted(seen) == list(range(1797))


def test_more_digits_than_there_are(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"at most 360.*found 361"):
        make("digits", tmp_path / "out", num_samples=361, size=16, split="test")
    assert not (tmp_path / "out").exists()
