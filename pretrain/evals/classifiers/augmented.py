"""Features of augmented training views, a batch at a time: the frozen encoder is run anew at every step.

Which samples are in a step, and their crops and flips, are the training loader's to say: a function of the seed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import torch
from torch import Tensor

from data_pipeline.batch import BatchSpec
from data_pipeline.datasets.dataset import Dataset
from data_pipeline.errors import InputError, RunError
from data_pipeline.loader import StepData, TrainLoader
from data_pipeline.samples.config import Views
from pretrain.evals.classifiers.heads import Examples
from pretrain.evals.encoder import Encoder
from pretrain.evals.features.extract import Extraction, full_precision, untouched
from pretrain.evals.features.readout import Reader
from pretrain.runtime.collectives import gather_rows

READ_STREAMS, SHUFFLE_WINDOW = 16, 1024  # of the order of samples


def augmented_views(encoder: Encoder, scale: tuple[float, float]) -> Views:
    """Random resized crops of `scale` (share of the area) and flips, resized as the encoder's evaluation views are."""
    return Views(scale=scale, interpolation=encoder.preprocessing.interpolation)


def augmented_examples(
    encoder: Encoder,
    dataset: Dataset,
    extraction: Extraction,
    views: Views,
    *,
    num_classes: int,
    batch_size: int,
    seed: int,
) -> Iterator[Examples]:
    """Features of each readout and labels of one batch after the other, without end.

    Batch t has the samples at positions t B .. (t + 1) B - 1 of the training order (data_pipeline/order/order.py). With
    several ranks each reads and computes its share, and every rank gets the whole batch.

    Args:
        encoder: left as it is; used in evaluation mode.
        dataset: with labels in [0, num_classes).
        extraction: `batch_size` is the most images of one forward pass on a rank.
        views: geometry of the views.
        num_classes: K.
        batch_size: B; the number of ranks divides it.
        seed: of order, crops and flips.

    Raises:
        InputError: B does not divide by the number of ranks.
        RunError: a sample cannot be used.
    """
    world_size = extraction.world_size
    if batch_size % world_size:
        raise InputError(
            where="--head-batch-size", expected=f"a multiple of the {world_size} ranks", found=str(batch_size)
        )
    share = batch_size // world_size
    micro_size = next(size for size in range(min(share, extraction.batch_size), 0, -1) if share % size == 0)
    loader = TrainLoader(
        dataset,
        BatchSpec(image_size=encoder.preprocessing.image_size, num_classes=num_classes),
        views,
        seed=seed,
        read_streams=READ_STREAMS,
        shuffle_window=SHUFFLE_WINDOW,
        global_size=micro_size * world_size,
        micro_size=micro_size,
        rank=extraction.rank,
        world_size=world_size,
        num_workers=extraction.num_workers,
        max_pixels=extraction.max_pixels,
    )
    reader = Reader(encoder.module, extraction.readouts)
    with closing(loader.steps(0)) as steps:  # type: ignore[type-var]
        while True:
            parts = [_forward(encoder, reader, extraction, next(steps)) for _ in range(share // micro_size)]
            values, labels = zip(*parts, strict=True)
            examples = *(torch.cat(of_readout) for of_readout in zip(*values, strict=True)), torch.cat(labels)
            if world_size > 1:
                examples = tuple(gather_rows(part.to(encoder.device)) for part in examples)
            yield examples[:-1], examples[-1]


def _forward(
    encoder: Encoder, reader: Reader, extraction: Extraction, step: StepData
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Runs one forward pass on this rank and returns features of each readout, and labels."""
    for bad in step.bad:
        raise RunError(where=f"{bad.shard}: {bad.key}", expected="a sample that can be used", found=bad.reason)
    (batch,) = step.micro_batches
    assert batch.labels is not None
    with untouched(encoder.module), full_precision():
        return extraction.forward(encoder, reader, batch), batch.labels
