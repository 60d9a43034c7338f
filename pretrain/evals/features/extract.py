"""Features of a frozen encoder over whole data sets, without a trace in random state or training flags."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from data_pipeline.batch import Batch, BatchSpec
from data_pipeline.datasets.dataset import Dataset
from data_pipeline.errors import CheckpointError, RunError
from data_pipeline.loader import batches_of
from data_pipeline.progress import track
from pretrain.augment.augment import normalize
from pretrain.evals.encoder import Encoder
from pretrain.evals.features.readout import OWN, Reader, Readout
from pretrain.evals.features.store import CacheEntry, FeatureStore, architecture_sha256, joined
from pretrain.evals.features.store import Features as Features
from pretrain.monitoring.budgets import too_many_left_out
from pretrain.runtime.agreement import agree
from pretrain.runtime.collectives import from_main
from pretrain.runtime.versions import LIBRARIES, of

T = TypeVar("T")

NUM_SHOWN = 5  # samples that a note names
DECODERS_AND_TOWERS = ("simplejpeg", "pillow", "open_clip_torch")


@dataclass(frozen=True)
class _ExtractionRequest:
    """What `Extraction.extract` is asked for; `total`: the first so many samples."""

    encoder: Encoder
    dataset: Dataset
    num_classes: int | None
    total: int
    label: str


@dataclass(frozen=True)
class Extraction:
    """How features are computed.

    Attributes:
        batch_size: images of one forward pass on this rank.
        precision: of the forward pass; bf16 is autocast. Features are fp32 either way.
        num_workers: loader processes; 0: in this one.
        max_pixels: an image of more cannot be used.
        max_bad_samples: of a data set that may be left out, as they cannot be used.
        readouts: what is taken of the encoder; evaluations that take one feature take the first.
        rank, world_size: this process among those that judge together; every rank calls `extract`.
    """

    batch_size: int = 256
    precision: Literal["fp32", "bf16"] = "fp32"
    num_workers: int = 0
    max_pixels: int = 50_000_000
    max_bad_samples: int = 100
    readouts: tuple[Readout, ...] = (OWN,)
    rank: int = 0
    world_size: int = 1
    store: FeatureStore | None = None

    def extract(
        self, encoder: Encoder, dataset: Dataset, *, num_classes: int | None, limit: int | None = None, label: str
    ) -> tuple[Features, ...]:
        """Features of every sample once, in the order of the data set, on the CPU; of each readout.

        Samples that cannot be used are left out, and named in `left_out`.

        Args:
            encoder: on the device it is to run on.
            dataset: with labels in [0, num_classes).
            num_classes: K; None: no labels are read.
            limit: the first samples only; None: all.
            label: of the progress line.

        Raises:
            DataError: the data set lacks images or labels.
            CheckpointError: the encoder does not give one finite vector per image.
            RunError: not every sample arrived exactly once, or more than `max_bad_samples` cannot be used.
        """
        total = dataset.num_samples if limit is None else min(limit, dataset.num_samples)
        asked = _ExtractionRequest(encoder, dataset, num_classes, total, label)
        found = self._in_memory(asked) if self.store is None else self._read_output(self.store, asked)
        if any(len(set(features.keys)) != total for features in found):
            num_keys = len(set(found[0].keys))
            raise RunError(where=label, expected=f"features of {total} samples, each once", found=f"{num_keys} keys")
        num_left_out = len(found[0].left_out)
        if num_left_out > self.max_bad_samples or num_left_out == total:
            budget = self.max_bad_samples if num_left_out < total else None
            one = found[0].left_out[0] if found[0].left_out else None
            where = f"{label}; {one.file}: {one.key}: {one.reason}" if one else label
            raise too_many_left_out(where, num_left_out, budget)
        return tuple(features.kept() for features in found)

    def _in_memory(self, asked: _ExtractionRequest) -> tuple[Features, ...]:
        if self.world_size > 1:
            raise ValueError("ranks share features through a store")
        parts: list[tuple[Features, ...]] = []
        self._compute(asked, self.readouts, [range(asked.total)], lambda _, part: parts.append(part))
        return tuple(joined(of_readout) for of_readout in zip(*parts, strict=True))

    def _read_output(self, store: FeatureStore, asked: _ExtractionRequest) -> tuple[Features, ...]:
        """Every rank first puts its share of what is missing there."""
        common = {
            "weights_sha256": asked.encoder.weights_sha256(),
            "architecture_sha256": architecture_sha256(asked.encoder.module),
            "preprocessing": asked.encoder.preprocessing.described(),
            "data": asked.dataset.state,
            "num_classes": asked.num_classes,
            "precision": self.precision,
            "device": asked.encoder.device.type,
            "versions": of((*LIBRARIES, *DECODERS_AND_TOWERS)),
        }
        shelves = [store.shelf({**common, "readout": str(readout)}, asked.total) for readout in self.readouts]
        # Rank 0 alone reads what is there: all of it, and others may have put something by the time the next one looks.
        missing = self._shared(lambda: [tuple(shelf.missing()) for shelf in shelves] if self.rank == 0 else [])
        if self.world_size > 1:
            missing = from_main(missing)

        def fill() -> None:
            for numbers in dict.fromkeys(missing):  # readouts that lack the same take the same forward passes
                chosen = [i for i, found in enumerate(missing) if found == numbers]
                self._fill([shelves[i] for i in chosen], asked, [self.readouts[i] for i in chosen], numbers)

        self._shared(fill)
        return self._shared(lambda: tuple(shelf.features() for shelf in shelves))

    def _shared(self, work: Callable[[], T]) -> T:
        """Does this rank's part of some work; where there are several ranks, all raise what goes wrong on one."""
        return agree(work) if self.world_size > 1 else work()

    def _fill(
        self,
        shelves: Sequence[CacheEntry],
        asked: _ExtractionRequest,
        readouts: Sequence[Readout],
        missing: Sequence[int],
    ) -> None:
        """Computes this rank's share of the missing chunks, a shelf for each readout."""
        numbers = missing[self.rank :: self.world_size]
        chunks = [shelves[0].chunks[number] for number in numbers]
        waiting: list[tuple[Features, ...]] = []

        def keep(index: int, part: tuple[Features, ...]) -> None:
            waiting.append(part)
            if sum(len(features[0]) for features in waiting) == len(chunks[index]):
                for shelf, of_readout in zip(shelves, zip(*waiting, strict=True), strict=True):
                    shelf.put(numbers[index], joined(of_readout))
                waiting.clear()

        self._compute(asked, readouts, chunks, keep)

    def _compute(
        self,
        asked: _ExtractionRequest,
        readouts: Sequence[Readout],
        rows: Sequence[range],
        keep: Callable[[int, tuple[Features, ...]], None],
    ) -> None:
        """Calls `keep` with the index of some rows and the next batch of them, of each readout."""
        if not rows:
            return
        pieces = [
            (index, range(start, min(start + self.batch_size, r.stop)))
            for index, r in enumerate(rows)
            for start in range(r.start, r.stop, self.batch_size)
        ]
        encoder = asked.encoder
        batches = batches_of(
            asked.dataset,
            BatchSpec(image_size=encoder.preprocessing.image_size, num_classes=asked.num_classes),
            encoder.preprocessing,
            [piece for _, piece in pieces],
            num_workers=self.num_workers,
            max_pixels=self.max_pixels,
        )
        reader = Reader(encoder.module, readouts)
        with untouched(encoder.module), full_precision():
            for (index, rows_of_piece), batch in zip(
                pieces, track(batches, label=asked.label, total=len(pieces)), strict=True
            ):
                labels = torch.full((len(batch),), -1) if batch.labels is None else batch.labels
                values = self.forward(encoder, reader, batch)
                left_out = tuple(replace(one, row=rows_of_piece[one.row]) for one in batch.left_out)
                keep(index, tuple(Features(value, labels, batch.keys, left_out) for value in values))

    def forward(self, encoder: Encoder, reader: Reader, batch: Batch) -> tuple[Tensor, ...]:
        """Each [B, D] fp32 on the CPU."""
        pixels = encoder.preprocessing
        images = normalize(batch.to(encoder.device), pixels.mean, pixels.std).views[0]
        with torch.autocast(encoder.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            values = reader(images)
        return tuple(self._checked(value, batch) for value in values)

    def _checked(self, values: Tensor, batch: Batch) -> Tensor:
        if values.ndim != 2 or len(values) != len(batch):
            raise CheckpointError(
                where="encoder", expected=f"features [{len(batch)}, D]", found=f"shape {list(values.shape)}",
                fix="Choose a pooling, such as --option global_pool=avg.",
            )  # fmt: skip
        values = values.float().cpu()
        broken = (~values.isfinite().all(dim=1)).nonzero().flatten().tolist()
        if broken:
            raise CheckpointError(
                where="encoder",
                expected="finite features",
                found=f"others for {len(broken)} of {len(batch)} samples, such as {batch.keys[broken[0]]}",
                fix="Check that its training did not diverge, or use fp32.",
            )
        return values


def left_out_notes(**sets: Features) -> tuple[list[str], dict[str, dict[str, int]]]:
    """What a report says of samples that were left out, by the name of their set: notes, and counts for its `data`."""
    notes, counts = [], {}
    for name, features in sets.items():
        if found := features.left_out:
            counts[name] = len(found)
            shown = "; ".join(f"{one.key} in {one.file}: {one.reason}" for one in found[:NUM_SHOWN])
            more = f"; and {len(found) - NUM_SHOWN} more" if len(found) > NUM_SHOWN else ""
            total = len(features) + len(found)
            notes.append(f"{len(found)} of {total} {name} samples are left out, as they cannot be used: {shown}{more}")
    return notes, {"left_out": counts} if counts else {}


@contextmanager
def untouched(module: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards random state and every part's flag are as they were."""
    training = {part: part.training for part in module.modules()}
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        module.eval()
        with torch.inference_mode(), torch.random.fork_rng(devices):
            yield
    finally:
        for part, flag in training.items():
            part.training = flag


@contextmanager
def full_precision() -> Iterator[None]:
    """fp32 products in fp32, whatever shortcuts (TF32, bf16) the process allows for training."""
    matmul, conv = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = conv
