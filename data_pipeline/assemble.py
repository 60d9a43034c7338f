"""One sample out of a data set -> its views, label and mask, in a row of the batch to be."""

from __future__ import annotations

from functools import cached_property
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from data_pipeline.batch import Batch, BatchSpec, Sample, TokenSpec
from data_pipeline.datasets.dataset import Dataset
from data_pipeline.errors import DataError, FieldError, SampleError
from data_pipeline.samples.captions import CaptionReader
from data_pipeline.samples.config import Augmentation, Views
from data_pipeline.samples.decode import decode_image
from data_pipeline.samples.draws import Value, draw
from data_pipeline.samples.preprocessing import Preprocessing
from data_pipeline.samples.views import Image, drawn_view, evaluation_size, evaluation_view, patch_mask
from data_pipeline.shards.index import IMAGE_FIELDS, LABEL_FIELD


def check(dataset: Dataset, spec: BatchSpec, captions: CaptionReader | None = None) -> None:
    """Hold a data set, or each source of a mixture, against what an objective needs, before anything starts.

    Args:
        captions: how captions are read, where `spec` asks for tokens.

    Raises:
        FieldError: samples have no image, lack labels or captions, or have labels out of range; the sources
            of a mixture have labels of different classes; soft labels are of another number of classes.
        DataError: `captions` does not make the tokens that `spec` asks for.
    """
    for part in dataset.parts:
        try:
            check(part.dataset, spec, captions)
        except FieldError as error:
            raise FieldError(f"{part.name}, {error.where}", error.expected, error.found, error.fix) from error
    if spec.num_classes is not None:
        dataset.check_classes()
    if not dataset.parts:
        _check_single(dataset, spec, captions)


def _check_single(dataset: Dataset, spec: BatchSpec, captions: CaptionReader | None) -> None:
    found = f"the fields {', '.join(dataset.fields) or '(none)'}"
    if not set(IMAGE_FIELDS) & set(dataset.fields):
        raise FieldError(
            where="image field",
            expected=f"one of {', '.join(IMAGE_FIELDS)}",
            found=found,
            fix="Give shards that hold images under one of these extensions.",
        )
    if spec.tokens is not None:
        _check_captions(spec.tokens, captions, dataset.fields, found)
    if spec.num_classes is not None:
        _check_labels(dataset, spec.num_classes, found)


def _check_captions(tokens: TokenSpec, captions: CaptionReader | None, fields: tuple[str, ...], found: str) -> None:
    made = None if captions is None else TokenSpec(captions.tokenizer.name, captions.tokenizer.context_length)
    if captions is None or made != tokens:
        raise DataError(where="captions", expected=f"{tokens}", found=f"{made}")
    if captions.captions.field not in fields:
        raise FieldError(
            where=f"caption field `{captions.captions.field}`",
            expected="a caption with every image",
            found=found,
            fix="Set data.captions.field to where the captions are, or convert with them: "
            "pretrain data convert TABLE OUT --caption-column NAME.",
        )


def _check_labels(dataset: Dataset, num_classes: int, found: str) -> None:
    if (soft := dataset.num_soft_classes) is not None:
        if soft != num_classes:
            raise FieldError(
                where="soft labels",
                expected=f"rows of {num_classes} classes (num_classes)",
                found=f"rows of {soft}",
                fix=f"Set num_classes to {soft}, or label by a teacher of {num_classes} classes.",
            )
        return
    counts = dataset.label_counts
    if counts is None:
        raise FieldError(
            where=f"label field `{LABEL_FIELD}`",
            expected="a class number with every image",
            found=found,
            fix="Train an objective without labels, or convert an image folder whose folders are classes.",
        )
    if unlabeled := dataset.num_samples - int(counts.sum()):
        raise FieldError(
            where=f"label field `{LABEL_FIELD}`",
            expected="a class number with every image",
            found=f"{unlabeled} of {dataset.num_samples} samples without one",
            fix="Run `pretrain data stats` on the shards, and write those samples again.",
        )
    highest = int(np.flatnonzero(counts).max(initial=-1))
    if highest >= num_classes:
        raise FieldError(
            where=f"label field `{LABEL_FIELD}`",
            expected=f"labels in [0, {num_classes}) (num_classes)",
            found=f"label {highest}",
            fix=f"Set num_classes to {highest + 1}.",
        )


class BatchBuffer:
    """Room for B samples, filled row by row, then cut into batches that share its memory.

    Args:
        soft: labels are [B, K] fp32, and a class number is written as a row with a one; else [B] int64.
    """

    def __init__(self, num_samples: int, spec: BatchSpec, *, soft: bool = False) -> None:
        shape = (num_samples, 3, spec.image_size, spec.image_size)
        self.keys = [""] * num_samples
        self.views = tuple(torch.empty(shape, dtype=torch.uint8) for _ in range(spec.num_views))
        self.labels: Tensor | None = None
        self.tokens: Tensor | None = None
        self.masks: Tensor | None = None
        if spec.num_classes is not None:
            self.labels = torch.empty(num_samples, dtype=torch.int64)
            if soft:
                self.labels = torch.empty(num_samples, spec.num_classes)
        if spec.tokens is not None:
            self.tokens = torch.empty(num_samples, spec.tokens.context_length, dtype=torch.int64)
        if spec.mask is not None:
            self.masks = torch.empty(num_samples, spec.mask.num_patches, dtype=torch.bool)
        self.draws: list[dict[str, Value]] = [{} for _ in range(num_samples)]
        self.undrawn_crops = [0] * num_samples
        self.seconds = {"read": 0.0, "decode": 0.0, "transform": 0.0}

    def blank(self, row: int, key: str) -> None:
        """Fill the row of a sample that cannot be used: with zeros, so that what is computed of it is harmless."""
        self.keys[row] = key
        for values in (*self.views, self.labels, self.tokens, self.masks):
            if values is not None:
                values[row] = 0

    def batch(self, start: int, stop: int) -> Batch:
        return Batch(
            keys=tuple(self.keys[start:stop]),
            views=tuple(view[start:stop] for view in self.views),
            labels=None if self.labels is None else self.labels[start:stop],
            tokens=None if self.tokens is None else self.tokens[start:stop],
            masks=None if self.masks is None else self.masks[start:stop],
            augment={name: values[start:stop] for name, values in self._augment.items()},
            undrawn_crops=sum(self.undrawn_crops[start:stop]),
        )

    @cached_property
    def _augment(self) -> dict[str, Tensor]:
        """The draws of all rows, once they are filled: one storage each, as every one takes a file descriptor."""
        return {name: torch.tensor([row[name] for row in self.draws]) for name in self.draws[0]}


class Assembler:
    """Fills rows of a buffer. What is random depends on (seed, epoch, key) and the number of the view.

    Args:
        dataset: where samples come from.
        spec: what a row holds.
        views: geometry of training views, or the preprocessing of evaluation views.
        augment: photometry of each training view, drawn here for the device to apply; empty: none.
        seed: of the views, the draws, the masks and the choice of captions.
        max_pixels: an image of more cannot be used.
        captions: how they are read, where `spec` asks for tokens.
    """

    def __init__(
        self,
        dataset: Dataset,
        spec: BatchSpec,
        views: Views | Preprocessing,
        augment: tuple[Augmentation, ...] = (),
        *,
        seed: int,
        max_pixels: int,
        captions: CaptionReader | None = None,
    ) -> None:
        self.dataset, self.spec, self.views, self.augment = dataset, spec, views, augment
        self.captions = captions
        self.seed, self.max_pixels = seed, max_pixels
        self._soft = dataset.num_soft_classes is not None

    def buffer(self, num_samples: int) -> BatchBuffer:
        """Room for so many of the data set's samples."""
        return BatchBuffer(num_samples, self.spec, soft=self._soft)

    def fill(self, buffer: BatchBuffer, row: int, i: int, epoch: int | None) -> None:
        """Write sample i as it looks in this epoch; None: as it is evaluated, with no chance in its views.

        Raises:
            SampleError: the sample cannot be used; the row may be filled with another.
        """
        start = perf_counter()
        sample = self.dataset.read(i)
        read = perf_counter()
        image = self._image(sample)
        decoded = perf_counter()
        buffer.keys[row] = sample.key
        if buffer.labels is not None:
            self._write_label(buffer.labels, row, sample)
        if buffer.tokens is not None:
            assert self.captions is not None
            buffer.tokens[row] = self.captions.tokens(sample, seed=self.seed, epoch=epoch)
        if isinstance(self.views, Preprocessing):
            self._evaluation_views(buffer, row, image, self.views)
        else:
            assert epoch is not None, "training views are drawn by their epoch"
            self._training_views(buffer, row, image, self.views, epoch)
        if buffer.masks is not None:
            buffer.masks[row] = self._mask(sample.key, epoch or 0)
        buffer.seconds["read"] += read - start
        buffer.seconds["decode"] += decoded - read
        buffer.seconds["transform"] += perf_counter() - decoded

    def _image(self, sample: Sample) -> Image:
        for name in IMAGE_FIELDS:
            if name in sample.fields:
                where = f"{sample.key}.{name}"
                return decode_image(sample.fields[name], max_pixels=self.max_pixels, where=where)
        found = f"the fields {', '.join(sample.fields) or '(none)'}"
        raise SampleError(where=sample.key, expected="an image", found=found)

    def _write_label(self, labels: Tensor, row: int, sample: Sample) -> None:
        if isinstance(sample.label, np.ndarray):
            labels[row] = torch.from_numpy(sample.label)
        elif labels.ndim == 2:
            labels[row] = 0
            labels[row, self._label(sample)] = 1
        else:
            labels[row] = self._label(sample)

    def _label(self, sample: Sample) -> int:
        if isinstance(sample.label, int):
            return sample.label  # in range: `check` looked at the counts of all
        text, num_classes = sample.fields.get(LABEL_FIELD), self.spec.num_classes or 0
        try:
            label = int(text or b"")
        except ValueError:
            label = -1
        if not 0 <= label < num_classes:
            raise SampleError(
                where=f"{sample.key}.{LABEL_FIELD}",
                expected=f"a class number in [0, {num_classes})",
                found="no such member" if text is None else repr(text[:40]),
            )
        return label

    def _training_views(self, buffer: BatchBuffer, row: int, image: Image, views: Views, epoch: int) -> None:
        size, key = self.spec.image_size, buffer.keys[row]
        buffer.undrawn_crops[row] = 0
        for number, view in enumerate(buffer.views):
            view[row], drawn = drawn_view(image, size, views, seed=self.seed, epoch=epoch, key=key, view=number)
            buffer.undrawn_crops[row] += not drawn
        buffer.draws[row] = {}
        for number, spec in enumerate(self.augment):
            buffer.draws[row] |= draw(spec, size=size, seed=self.seed, epoch=epoch, key=key, view=number)

    def _evaluation_views(self, buffer: BatchBuffer, row: int, image: Image, preprocessing: Preprocessing) -> None:
        height, width = evaluation_size(image.shape[0], image.shape[1], preprocessing)
        if height * width > self.max_pixels:  # a very narrow image grows without bound
            raise SampleError(
                where=buffer.keys[row],
                expected=f"at most {self.max_pixels} pixels (data.max_pixels) after its resize",
                found=f"{image.shape[1]} x {image.shape[0]}, resized {width} x {height}",
            )
        for view in buffer.views:
            view[row] = evaluation_view(image, preprocessing)

    def _mask(self, key: str, epoch: int) -> Tensor:
        assert self.spec.mask is not None
        return patch_mask(self.spec.mask, seed=self.seed, epoch=epoch, key=key)
