"""A cursor in, the batches of one step and the next cursor out; and every sample once, for evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count

from data_pipeline.assemble import Assembler, BatchBuffer, check
from data_pipeline.batch import Batch, BatchSpec, LeftOut
from data_pipeline.datasets.dataset import Dataset
from data_pipeline.datasets.remote_parts import remote_parts
from data_pipeline.errors import DataError, RunError, SampleError
from data_pipeline.order.order import SampleOrder
from data_pipeline.order.repeats import Repeated
from data_pipeline.remote.prefetch import prefetched
from data_pipeline.samples.captions import CaptionReader
from data_pipeline.samples.config import Augmentation, Mixing, Views
from data_pipeline.samples.draws import draw_mix
from data_pipeline.samples.preprocessing import Preprocessing
from data_pipeline.workers import check_shared_memory, entries


@dataclass(frozen=True)
class BadSample:
    """A sample that could not be used, and the one of its window that stands in for it: a reported repeat."""

    position: int
    key: str
    shard: str
    reason: str
    replacement_key: str


@dataclass(frozen=True)
class StepData:
    """One rank's share of one step.

    Attributes:
        micro_batches: its samples in the order of rule 4 (order.py), cut into equal parts.
        cursor: the next position, where the following step starts.
        bad: this rank's samples that were replaced; whoever runs the loop counts them.
        seconds: that this step took for "read", "decode" and "transform", in the process that made it.
    """

    micro_batches: tuple[Batch, ...]
    cursor: int
    bad: tuple[BadSample, ...]
    seconds: dict[str, float]

    def pin_memory(self) -> StepData:
        """Called by torch's DataLoader in its pinning thread."""
        return replace(self, micro_batches=tuple(batch.pin_memory() for batch in self.micro_batches))


class TrainLoader:
    """The endless training stream of one rank. Its only state is the cursor, and that is the caller's.

    Neither the number of workers nor that of ranks changes a pixel: a worker makes whole steps, each from its
    cursor alone.

    Args:
        dataset: where samples come from; of a mixture, each source is read in an order of its own.
        spec: what a batch holds.
        views: geometry of the views.
        augment: photometry of each view, drawn here for the device to apply; empty: none.
        mixing: of neighboring samples, likewise; `micro_size` must be even.
        seed: of the order, the views, the draws, the masks and the choice of captions.
        read_streams, shuffle_window: of the order (order.py).
        repeats: how often each sample comes in a row, drawn anew each time (repeats.py).
        global_size: B, samples of a step over all ranks and micro-batches.
        micro_size: samples of one micro-batch on this rank; `world_size * micro_size` divides `global_size`.
        rank, world_size: which piece of each step is this one's.
        num_workers: processes of one thread each that make steps ahead; 0: in this process.
        max_pixels: an image of more is a bad sample.
        captions: how they are read, where `spec` asks for tokens.

    Raises:
        DataError: `global_size` does not divide, `micro_size` would cut pairs apart, or the data set is empty.
        FieldError: the data set lacks what `spec` needs (see `check`).
    """

    def __init__(
        self,
        dataset: Dataset,
        spec: BatchSpec,
        views: Views,
        augment: tuple[Augmentation, ...] = (),
        mixing: Mixing | None = None,
        *,
        seed: int,
        read_streams: int,
        shuffle_window: int,
        repeats: int = 1,
        global_size: int,
        micro_size: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        max_pixels: int,
        captions: CaptionReader | None = None,
    ) -> None:
        if global_size % (world_size * micro_size):
            raise DataError(
                where="batch.global_size",
                expected=f"a multiple of {world_size} ranks x {micro_size} samples",
                found=str(global_size),
            )
        if mixing is not None and micro_size % 2:
            raise DataError(
                where="batch.micro_size", expected="an even number, to mix samples in pairs", found=str(micro_size)
            )
        check(dataset, spec, captions)
        order = dataset.order(seed=seed, read_streams=read_streams, shuffle_window=shuffle_window)
        order = Repeated(order, repeats) if repeats > 1 else order
        assembler = Assembler(dataset, spec, views, augment, seed=seed, max_pixels=max_pixels, captions=captions)
        self._steps = _Steps(order, assembler, mixing, global_size, micro_size, rank, world_size)
        self._num_workers, self._read_streams = num_workers, read_streams

    def steps(self, cursor: int) -> Iterator[StepData]:
        """Step after step from position `cursor` on, without end.

        Worker processes end when the iterator is closed or dropped.

        Raises:
            RunError: a sample and all that might stand in for it cannot be used, a worker died, or its batches do not
                fit into shared memory.
            DataError: a shard cannot be read at all.
        """
        spec, local_size = self._steps.assembler.spec, self._steps.global_size // self._steps.world_size
        check_shared_memory(self._num_workers, None, local_size * _view_bytes(spec))
        made = entries(self._steps, count(cursor, self._steps.global_size), self._num_workers)
        return prefetched(
            made,
            remote_parts(self._steps.assembler.dataset),
            self._steps.order,
            cursor=cursor,
            read_streams=self._read_streams,
            global_size=self._steps.global_size,
            rank=self._steps.rank,
            world_size=self._steps.world_size,
        )


@dataclass(frozen=True)
class _Steps:
    """Cursor -> the step that starts there."""

    order: SampleOrder
    assembler: Assembler
    mixing: Mixing | None
    global_size: int
    micro_size: int
    rank: int
    world_size: int

    def __getitem__(self, cursor: int) -> StepData:
        positions = self.order.step_positions(cursor, self.global_size, self.rank, self.world_size)
        places = zip(
            positions.tolist(),
            self.order.locate(positions).tolist(),
            self.order.epochs(positions).tolist(),
            strict=True,
        )
        buffer = self.assembler.buffer(len(positions))
        bad = []
        for row, (position, i, epoch) in enumerate(places):
            try:
                self.assembler.fill(buffer, row, i, epoch)
            except SampleError as error:
                key, shard = self.assembler.dataset.origin(i)
                replacement_key = self._replace(buffer, row, position, epoch, f"{shard}: {key}", error)
                bad.append(BadSample(position, key, shard, str(error), replacement_key))
        self._draw_mixing(buffer, cursor)
        starts = range(0, len(positions), self.micro_size)
        micro_batches = tuple(buffer.batch(start, start + self.micro_size) for start in starts)
        return StepData(micro_batches, cursor + self.global_size, tuple(bad), buffer.seconds)

    def _draw_mixing(self, buffer: BatchBuffer, cursor: int) -> None:
        """The same for both samples of a pair, whose number counts through the ranks."""
        if self.mixing is None:
            return
        size, seed = self.assembler.spec.image_size, self.assembler.seed
        local_size = len(buffer.draws)
        for row in range(0, local_size, 2):
            pair = (self.rank * local_size + row) // 2
            drawn = draw_mix(self.mixing, size=size, seed=seed, cursor=cursor, pair=pair)
            buffer.draws[row] |= drawn
            buffer.draws[row + 1] |= drawn

    def _replace(self, buffer: BatchBuffer, row: int, position: int, epoch: int, where: str, error: SampleError) -> str:
        """Fill the row from the next usable position of its window, and return that sample's key."""
        tried = 0
        for i in self.order.stand_ins(position):
            try:
                self.assembler.fill(buffer, row, i, epoch)
            except SampleError:
                tried += 1  # reported when its own position comes
            else:
                return buffer.keys[row]
        raise RunError(
            where=where,
            expected=f"{error.expected}, or a sample near it to stand in",
            found=f"{error.found}; nor can any of the next {tried} be used",
            fix="Run `pretrain data verify` on the shards.",
        )


def evaluation_batches(
    dataset: Dataset,
    spec: BatchSpec,
    preprocessing: Preprocessing,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    max_pixels: int,
    limit: int | None = None,
    captions: CaptionReader | None = None,
) -> Iterator[Batch]:
    """Every sample exactly once over the ranks, in the order of the data set, resized and center cropped.

    One that cannot be used is a blank row, named in its batch's `left_out`.

    Rank r has the contiguous piece r of `world_size`; pieces differ by at most one sample, and the last batch
    is short. Nothing is random: a mask, where `spec` asks for one, depends on the key alone.

    Args:
        preprocessing: geometry of the views, which stay uint8: mean and std are the device's to apply.
        limit: the first samples only; None: all.
        captions: how they are read, where `spec` asks for tokens; of several, the first.

    Raises:
        FieldError: the data set lacks what `spec` needs (see `check`); before anything is read.
    """
    total = dataset.num_samples if limit is None else min(limit, dataset.num_samples)
    first, end = total * rank // world_size, total * (rank + 1) // world_size
    pieces = [range(start, min(start + batch_size, end)) for start in range(first, end, batch_size)]
    return batches_of(
        dataset, spec, preprocessing, pieces, num_workers=num_workers, max_pixels=max_pixels, captions=captions
    )


def batches_of(
    dataset: Dataset,
    spec: BatchSpec,
    preprocessing: Preprocessing,
    pieces: Sequence[Sequence[int]],
    *,
    num_workers: int = 0,
    max_pixels: int,
    captions: CaptionReader | None = None,
) -> Iterator[Batch]:
    """One batch for each piece, samples by their number, as `evaluation_batches` makes them; raises as it does."""
    if preprocessing.image_size != spec.image_size:
        raise ValueError(f"views of {spec.image_size} pixels, prepared for {preprocessing.image_size}")
    check(dataset, spec, captions)
    assembler = Assembler(dataset, spec, preprocessing, seed=0, max_pixels=max_pixels, captions=captions)
    largest = max(map(len, pieces), default=0)
    check_shared_memory(num_workers, len(pieces), largest * _view_bytes(spec))
    return entries(_Pieces(assembler, pieces), range(len(pieces)), num_workers)


def _view_bytes(spec: BatchSpec) -> int:
    """The views of one sample, uint8; what else a batch has is small beside them."""
    return spec.num_views * 3 * spec.image_size**2


@dataclass(frozen=True)
class _Pieces:
    """Number of a piece -> the batch of its samples."""

    assembler: Assembler
    pieces: Sequence[Sequence[int]]

    def __getitem__(self, number: int) -> Batch:
        indices = self.pieces[number]
        buffer = self.assembler.buffer(len(indices))
        left_out = []
        for row, i in enumerate(indices):
            try:
                self.assembler.fill(buffer, row, i, epoch=None)
            except SampleError as error:
                key, file = self.assembler.dataset.origin(i)
                buffer.blank(row, key)
                left_out.append(LeftOut(row, key, file, str(error)))
        return replace(buffer.batch(0, len(indices)), left_out=tuple(left_out))
