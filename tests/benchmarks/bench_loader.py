"""Images per second of the training loader, in one process and thread, against two others on the same photos.

1. open_clip's own training transform over webdataset's reader with its Pillow decode, at its own crop scale.
   It hands out normalised floats, ours uint8 for the device to normalise: a row of its own counts that work
   too, on the CPU.
2. A plain loop over bytes in memory of the fastest calls known (simplejpeg, slice, torch's antialiased uint8
   resize), with the crops the loader draws. Ours reads, checks crc32, draws, flips and fills batches on top.

The two sides of a row make one batch each in turn, so that a slow spell of the machine hits both.

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
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

if __name__ == "__main__":  # from a checkout, without installing
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import open_clip
import simplejpeg
import torch
import webdataset
from torch import Tensor
from torch.nn.functional import interpolate

from data_pipeline.batch import BatchSpec
from data_pipeline.datasets.dataset import Dataset
from data_pipeline.datasets.read import open_dataset
from data_pipeline.loader import TrainLoader
from data_pipeline.order import keyed
from data_pipeline.order.order import Order
from data_pipeline.samples.config import Views
from data_pipeline.samples.views import Box, crop_box
from data_pipeline.shards.scan import index_shards

SIZE, BATCH, SHARD, LANES, WINDOW = 224, 64, 256, 16, 128
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
MAE = Views(scale=(0.2, 1.0))
OPEN_CLIP = Views(scale=(0.9, 1.0), flip=0.0)  # open_clip.image_transform(is_train=True)

Batches = Iterator[object]


class Row(NamedTuple):
    """Medians over the pairs: images/s of both sides, and the ratio ours / other with its quartiles."""

    name: str
    ours: float
    other: float
    ratio: float
    lower: float
    upper: float
    goal: float | None


def write_shards(photos: Path, folder: Path, samples: int) -> None:
    """The photographs over and over, `samples` in all, as shards with their index and manifest."""
    with tarfile.open(photos) as tar:
        images = [file.read() for member in tar if member.isfile() and (file := tar.extractfile(member))]
    for first in range(0, samples, SHARD):
        with webdataset.TarWriter(str(folder / f"photos-{first // SHARD:04d}.tar")) as writer:
            for i in range(first, min(first + SHARD, samples)):
                writer.write({"__key__": f"{i:06d}", "jpg": images[i % len(images)]})
    index_shards(str(folder))


def ours(dataset: Dataset, views: Views, *, normalize: bool = False) -> Batches:
    loader = TrainLoader(
        dataset,
        BatchSpec(SIZE),
        views,
        seed=0,
        read_streams=LANES,
        shuffle_window=WINDOW,
        global_size=BATCH,
        micro_size=BATCH,
        max_pixels=50_000_000,
    )
    for step in loader.steps(0):
        view = step.micro_batches[0].views[0]
        yield (view.float() / 255 - MEAN) / STD if normalize else view


def open_clip_over_webdataset(folder: Path) -> Batches:
    urls = sorted(str(path) for path in folder.glob("*.tar"))
    samples = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).repeat().decode("pilrgb")
    transform = open_clip.image_transform(SIZE, is_train=True)
    return iter(samples.rename(image="jpg").map_dict(image=transform).to_tuple("image").batched(BATCH))


def plain_loop(dataset: Dataset, views: Views) -> Batches:
    """The batches of `ours` in the first epoch, over and over; samples and crops are known beforehand."""
    order = Order(dataset.shard_sizes, seed=0, read_streams=LANES, shuffle_window=WINDOW)
    batches = []
    for cursor in range(0, dataset.num_samples - BATCH + 1, BATCH):
        samples = [dataset.read(i) for i in order.locate(order.step_positions(cursor, BATCH)).tolist()]
        batches.append([(s.fields["jpg"], drawn_box(s.key, s.fields["jpg"], views)) for s in samples])
    while True:
        for batch in batches:
            yield [view_of(data, box) for data, box in batch]


def drawn_box(key: str, data: bytes, views: Views) -> Box:
    draws = keyed.uniforms("view", 0, 0, 0, key)
    next(draws)  # the flip
    height, width, *_ = simplejpeg.decode_jpeg_header(data)
    return crop_box(height, width, views, draws)


def view_of(data: bytes, box: Box) -> Tensor:
    top, left, height, width = box
    crop = simplejpeg.decode_jpeg(data)[top : top + height, left : left + width]
    pixels = torch.from_numpy(crop).permute(2, 0, 1)[None]
    return interpolate(pixels, (SIZE, SIZE), mode="bicubic", antialias=True)


def compare(name: str, left: Batches, right: Batches, *, pairs: int, goal: float | None = None) -> Row:
    def seconds(side: Batches) -> float:
        start = perf_counter()
        next(side)
        return perf_counter() - start

    seconds(left), seconds(right)  # the first batches open files and start codecs
    times = []
    for pair in range(pairs):
        if pair % 2:
            times.append((seconds(left), seconds(right)))
        else:
            times.append((seconds(right), seconds(left))[::-1])
    rates = [BATCH / statistics.median(side) for side in zip(*times, strict=True)]
    lower, ratio, upper = statistics.quantiles((b / a for a, b in times), n=4)
    return Row(name, rates[0], rates[1], ratio, lower, upper, goal)


def run(photos: Path, *, samples: int = 2048) -> list[Row]:
    """Every comparison, with one thread, over so many samples a side (the last: three times as many).

    Args:
        photos: a tar of JPEGs.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pairs = samples // BATCH
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_shards(photos, folder, samples)
            dataset = open_dataset(name)
            theirs = open_clip_over_webdataset(folder)
            return [
                compare(
                    "open_clip transform over webdataset",
                    ours(dataset, OPEN_CLIP),
                    theirs,
                    pairs=pairs,
                    goal=1.8,
                ),
                compare(
                    "the same, ours normalised on the CPU",
                    ours(dataset, OPEN_CLIP, normalize=True),
                    theirs,
                    pairs=pairs,
                ),
                compare(
                    "plain loop, MAE crops",
                    ours(dataset, MAE),
                    plain_loop(dataset, MAE),
                    pairs=3 * pairs,  # the two are close
                    goal=0.9,
                ),
            ]
    finally:
        torch.set_num_threads(threads)


def of_arguments(description: str | None, run: Callable[..., list[Row]], *, default: int) -> None:
    """A benchmark's command line: runs it and prints its rows."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = Path(os.environ.get("PRETRAIN_TEST_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
    parser.add_argument("--samples", type=int, default=default, help=f"of each side, from {2 * BATCH} on")
    parser.add_argument("--photos", type=Path, default=data / "photos.tar", help="a tar of JPEGs")
    arguments = parser.parse_args()
    if not arguments.photos.is_file():
        parser.error(f"no photographs at {arguments.photos}; give --photos, or set PRETRAIN_TEST_DATA")
    print(f"{'ours against':46} {'ours/s':>8} {'other/s':>8} {'ratio':>6}  {'quartiles':13} goal")
    for row in run(arguments.photos, samples=arguments.samples):
        goal = f">= {row.goal}" if row.goal else ""
        spread = f"{row.lower:.2f} .. {row.upper:.2f}"
        print(f"{row.name:46} {row.ours:8.0f} {row.other:8.0f} {row.ratio:6.2f}  {spread:13} {goal}")


if __name__ == "__main__":
    of_arguments(__doc__, run, default=2048)
