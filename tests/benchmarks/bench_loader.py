"""Images per second of the training loader, one process and one thread, against two others on the same photographs.

1. open_clip's own training transform over webdataset's reader with its Pillow decode, at that transform's crop scale.
   It hands out normalised floats, ours uint8: normalising on the CPU is counted in a row of its own.
2. A plain loop over bytes in memory of the fastest calls known (simplejpeg, slice, torch's antialiased uint8 resize),
   with the crops the loader draws. Ours reads, checks crc32, draws, flips and fills batches on top.

Each row is timed in pairs, side after side in turn, so that a slow spell of the machine hits both.

    python tests/benchmarks/bench_loader.py [--samples 2048]
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

if __name__ == "__main__":  # from a checkout, without installing
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import simplejpeg
import torch
import webdataset
from torch.nn.functional import interpolate

from data_pipeline import keyed
from data_pipeline.batch import BatchSpec
from data_pipeline.loader import TrainLoader
from data_pipeline.order import Order
from data_pipeline.read import IMAGE_FIELDS, Dataset, open_dataset
from data_pipeline.scan import index_shards
from data_pipeline.views import ViewSpec, crop_box

SIZE, BATCH, SHARD = 224, 64, 256
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
MAE = ViewSpec(scale=(0.2, 1.0))
OPEN_CLIP = ViewSpec(scale=(0.9, 1.0), flip=0.0)  # open_clip.image_transform(is_train=True)

Contender = Iterator[object]  # one item per batch


class Row(NamedTuple):
    """Rates in images/s, medians over the pairs; `ratio` is ours / other, with its least and greatest pair."""

    name: str
    ours: float
    other: float
    ratio: float
    ratio_low: float
    ratio_high: float
    goal: float | None


def write_shards(photos: Path, folder: Path, samples: int) -> None:
    """The photographs over and over, `samples` in all, as shards with their index and manifest."""
    with tarfile.open(photos) as tar:
        images = [tar.extractfile(member).read() for member in tar if member.isfile()]  # type: ignore[union-attr]
    for shard in range(0, samples, SHARD):
        with webdataset.TarWriter(str(folder / f"photos-{shard // SHARD:04d}.tar")) as writer:
            for i in range(shard, min(shard + SHARD, samples)):
                writer.write({"__key__": f"{i:06d}", "jpg": images[i % len(images)]})
    index_shards(str(folder))


def ours(dataset: Dataset, views: ViewSpec, *, normalize: bool = False) -> Contender:
    loader = TrainLoader(
        dataset, BatchSpec(SIZE), views, seed=0, lanes=16, window=128, global_size=BATCH, micro_size=BATCH,
        max_pixels=50_000_000,
    )  # fmt: skip
    for step in loader.steps(0):
        view = step.micro_batches[0].views[0]
        yield ((view.float() / 255) - MEAN) / STD if normalize else view


def open_clip_over_webdataset(folder: Path) -> Contender:
    import open_clip

    transform = open_clip.image_transform(SIZE, is_train=True)
    urls = sorted(str(path) for path in folder.glob("*.tar"))
    reader = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).repeat()
    return iter(
        reader.decode("pilrgb").rename(image="jpg").map_dict(image=transform).to_tuple("image").batched(BATCH)
    )


def plain_loop(dataset: Dataset, views: ViewSpec) -> Contender:
    """The samples and crops of `ours`, both known before the clock runs."""
    order = Order(dataset.shard_sizes, seed=0, lanes=16, window=128)
    work = []
    for i in order.locate(order.step_positions(0, dataset.num_samples)).tolist():
        sample = dataset.read(i)
        data = next(sample.fields[name] for name in IMAGE_FIELDS if name in sample.fields)
        height, width, *_ = simplejpeg.decode_jpeg_header(data)
        draws = keyed.uniforms(keyed.seed_of("view", 0, 0, 0, sample.key), 23)
        work.append((data, crop_box(height, width, views, draws[1:])))
    while True:
        for start in range(0, len(work) - BATCH + 1, BATCH):
            views_of_batch = []
            for data, (top, left, height, width) in work[start : start + BATCH]:
                crop = simplejpeg.decode_jpeg(data)[top : top + height, left : left + width]
                pixels = torch.from_numpy(crop).permute(2, 0, 1)[None]
                views_of_batch.append(interpolate(pixels, (SIZE, SIZE), mode="bicubic", antialias=True))
            yield views_of_batch


def compare(
    name: str, left: Contender, right: Contender, *, samples: int, pairs: int, goal: float | None
) -> Row:
    batches = max(1, samples // pairs // BATCH)

    def rate(contender: Contender) -> float:
        start = perf_counter()
        for _ in islice(contender, batches):
            pass
        return batches * BATCH / (perf_counter() - start)

    next(left), next(right)  # first calls open files and import codecs
    rates = []
    for pair in range(pairs):
        sides = [rate(side) for side in ((left, right) if pair % 2 else (right, left))]
        rates.append(sides if pair % 2 else sides[::-1])
    ratios = [a / b for a, b in rates]
    medians = [statistics.median(side) for side in zip(*rates, strict=True)]
    return Row(name, *medians, statistics.median(ratios), min(ratios), max(ratios), goal)


def run(photos: Path, *, samples: int = 2048, pairs: int = 7) -> list[Row]:
    """Every comparison, with one thread; `photos` is a tar of JPEG photographs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_shards(photos, folder, samples)
            dataset = open_dataset(str(folder))
            other: list[tuple[str, Contender, Callable[[], Contender], float | None]] = [
                ("open_clip transform over webdataset", ours(dataset, OPEN_CLIP),
                 lambda: open_clip_over_webdataset(folder), 1.8),
                ("the same, ours normalised on the CPU too", ours(dataset, OPEN_CLIP, normalize=True),
                 lambda: open_clip_over_webdataset(folder), None),
                ("plain loop, MAE crops", ours(dataset, MAE), lambda: plain_loop(dataset, MAE), 0.9),
            ]  # fmt: skip
            return [
                compare(label, left, right(), samples=samples, pairs=pairs, goal=goal)
                for label, left, right, goal in other
            ]
    finally:
        torch.set_num_threads(threads)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=2048)
    parser.add_argument("--pairs", type=int, default=7)
    default = Path(
        os.environ.get("PRETRAIN_TEST_DATA", Path(__file__).resolve().parents[3] / "shared" / "data")
    )
    parser.add_argument("--photos", type=Path, default=default / "photos.tar")
    arguments = parser.parse_args()
    if not arguments.photos.is_file():
        parser.error(f"no photographs at {arguments.photos}; give --photos, or set PRETRAIN_TEST_DATA")
    print(f"{'ours against':42} {'ours/s':>8} {'other/s':>8} {'ratio':>6}  {'spread':13} goal")
    for row in run(arguments.photos, samples=arguments.samples, pairs=arguments.pairs):
        spread = f"{row.ratio_low:.2f} .. {row.ratio_high:.2f}"
        goal = f">= {row.goal}" if row.goal else ""
        print(f"{row.name:42} {row.ours:8.0f} {row.other:8.0f} {row.ratio:6.2f}  {spread:13} {goal}")


if __name__ == "__main__":
    main()
