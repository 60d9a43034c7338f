"""Procedural images -> shards, so that anything can be tried with nothing downloaded."""

from __future__ import annotations

from pathlib import Path

from data_pipeline.errors import DataError
from data_pipeline.procedural.fractals import Fractals
from data_pipeline.procedural.shapes import HELD_OUT, Shapes
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.write import split_evenly, write_dataset

KINDS = ("fractals", "shapes", "digits")
SPLITS = ("train", "test")
SIZES = range(8, 1025)


def make(
    kind: str,
    out: Path,
    *,
    num_samples: int,
    size: int,
    seed: int = 0,
    split: str = "train",
    num_classes: int = 10,
    shard_size: int = 1000,
    workers: int = 1,
) -> Manifest:
    """Make `num_samples` images in `out`; equal arguments give equal bytes, whatever `workers`.

    Args:
        kind: fractals, shapes or digits.
        size: side of the square images, pixels.
        seed: of the images; the classes are the same for every seed.
        split: train or test: other images, of the same classes.
        num_classes: of fractals.
        shard_size: at most so many samples per shard.
        workers: processes.

    Raises:
        DataError: an argument is out of range, or `out` holds something else.
        RunError: a file could not be written.
    """
    _check("kind", kind, KINDS)
    _check("--split", split, SPLITS)
    for name, value, allowed in (
        ("--size", size, SIZES),
        ("--samples", num_samples, range(1, 10**9)),
        ("--classes", num_classes, range(2, 10**5)),
        ("--shard-size", shard_size, range(1, 10**7)),
        ("--seed", seed, range(2**63)),
    ):
        if value not in allowed:
            raise DataError(where=name, expected=f"{allowed.start} to {allowed.stop - 1}", found=str(value))
    plan = {"made_by": f"make {kind} 1", "samples": num_samples, "size": size, "seed": seed, "split": split}
    plan["shard_size"] = shard_size
    producer: Fractals | Shapes | Digits
    if kind == "fractals":
        producer = Fractals(split, seed, size, num_classes)
        plan["classes"] = num_classes
    elif kind == "shapes":
        producer = Shapes(split, seed, size)
        plan["held_out"] = [f"{color} {shape}" for color, shape in HELD_OUT]
    else:
        from data_pipeline.procedural.digits import Digits  # scikit-learn takes a second to import

        producer = Digits(split, seed, size)
        producer.check(num_samples)
    shards = split_evenly(range(num_samples), shard_size)
    manifest, _ = write_dataset(
        out, plan, shards, producer, classes=producer.classes, workers=workers, label=f"making {kind}"
    )
    return manifest


def _check(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise DataError(where=name, expected=" or ".join(allowed), found=repr(value))
