"""Images per second of BYOL's two augmented views, on one thread, against Pillow and torchvision.

1. What the host does: ours reads, decodes once, cuts two views and draws the parameters of their colours; the other
   decodes and does everything in Pillow, as BYOL pipelines over PIL images do. Both end in uint8 tensors.
2. Everything on this one core, normalised: ours with the part that is the device's.
3. The device's part alone against the same in Pillow, on views that are cut already.

The two sides of a row make one batch each in turn, as in bench_loader.py. Images count once, not once per view.

    python tests/benchmarks/bench_views.py [--samples 1024]
"""

from __future__ import annotations

import io
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

if __name__ == "__main__":  # from a checkout, without installing
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from data_pipeline.batch import Batch, BatchSpec
from data_pipeline.datasets.dataset import Dataset
from data_pipeline.datasets.read import open_dataset
from data_pipeline.loader import TrainLoader
from data_pipeline.samples.config import Augmentation, Blur, Jitter, Views
from pretrain.augment.augment import prepare
from tests.benchmarks.bench_loader import BATCH, LANES, SIZE, WINDOW, Batches, Row, compare, of_arguments, write_shards

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CROP = Views(scale=(0.08, 1.0))
BYOL = tuple(  # arXiv:2006.07733, table 6: the two views differ in blur and solarise
    Augmentation(
        jitter=Jitter(probability=0.8, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1),
        grayscale=0.2,
        blur=Blur(probability=blur),
        solarize=solarise,
    )
    for blur, solarise in ((1.0, 0.0), (0.1, 0.2))
)

Transform = Callable[[Image.Image], Image.Image]


def host(dataset: Dataset) -> Iterator[Batch]:
    loader = TrainLoader(
        dataset,
        BatchSpec(SIZE, num_views=2),
        CROP,
        BYOL,
        seed=0,
        read_streams=LANES,
        shuffle_window=WINDOW,
        global_size=BATCH,
        micro_size=BATCH,
        max_pixels=50_000_000,
    )
    for step in loader.steps(0):
        yield step.micro_batches[0]


def device(batches: Iterator[Batch]) -> Batches:
    for batch in batches:
        yield prepare(batch, torch.device("cpu"), MEAN, STD)


def pillow(dataset: Dataset, views: list[Transform], *, normalize: bool) -> Batches:
    to_tensor: list[object] = [transforms.PILToTensor()]
    if normalize:
        to_tensor = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    finish = transforms.Compose(to_tensor)
    while True:
        for first in range(0, dataset.num_samples - BATCH + 1, BATCH):
            images = [decoded(dataset, i) for i in range(first, first + BATCH)]
            yield [stacked(images, view, finish) for view in views]


def pillow_colours(batch: Batch, colours: list[Transform]) -> Batches:
    to_image = transforms.ToPILImage()
    images = [[to_image(pixels) for pixels in view] for view in batch.views]
    finish = transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    while True:
        yield [stacked(view, colour, finish) for view, colour in zip(images, colours, strict=True)]


def decoded(dataset: Dataset, i: int) -> Image.Image:
    return Image.open(io.BytesIO(dataset.read(i).fields["jpg"])).convert("RGB")


def stacked(images: list[Image.Image], view: Transform, finish: Callable[[Image.Image], Tensor]) -> Tensor:
    return torch.stack([finish(view(image)) for image in images])


def pillow_crop() -> Transform:
    crop = transforms.RandomResizedCrop(SIZE, CROP.scale, interpolation=InterpolationMode.BICUBIC)
    return transforms.Compose([crop, transforms.RandomHorizontalFlip()])  # type: ignore[no-any-return]


def pillow_colour(spec: Augmentation) -> Transform:
    """The same operations and probabilities by torchvision on PIL images, with Pillow's own blur."""
    assert spec.jitter is not None
    assert spec.blur is not None
    jitter, low, high = spec.jitter, *spec.blur.sigma
    strengths = (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
    blur = transforms.Lambda(lambda image: image.filter(ImageFilter.GaussianBlur(random.uniform(low, high))))
    return transforms.Compose(  # type: ignore[no-any-return]
        [
            transforms.RandomApply([transforms.ColorJitter(*strengths)], jitter.probability),
            transforms.RandomGrayscale(spec.grayscale),
            transforms.RandomApply([blur], spec.blur.probability),
            transforms.RandomSolarize(128, spec.solarize),
        ]
    )


def run(photos: Path, *, samples: int = 1024) -> list[Row]:
    """Every comparison, with one thread, over so many samples a side.

    Args:
        photos: a tar of JPEGs.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pairs = samples // BATCH
    try:
        with tempfile.TemporaryDirectory() as name:
            write_shards(photos, Path(name), samples)
            dataset = open_dataset(name)
            colours = [pillow_colour(spec) for spec in BYOL]
            views: list[Transform] = [transforms.Compose([pillow_crop(), colour]) for colour in colours]
            batch = next(host(dataset))
            return [
                compare(
                    "Pillow, what the host does",
                    host(dataset),
                    pillow(dataset, views, normalize=False),
                    pairs=pairs,
                    goal=4,
                ),
                compare(
                    "Pillow, with the device's part on this core",
                    device(host(dataset)),
                    pillow(dataset, views, normalize=True),
                    pairs=pairs,
                ),
                compare(
                    "Pillow, the device's part alone on this core",
                    device(iter(lambda: batch, None)),
                    pillow_colours(batch, colours),
                    pairs=pairs,
                ),
            ]
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    of_arguments(__doc__, run, default=1024)
