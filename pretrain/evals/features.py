"""Features of a frozen encoder over whole data sets, without a trace in random state or training flags."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from data_pipeline.batch import Batch, BatchSpec
from data_pipeline.errors import CheckpointError, RunError
from data_pipeline.loader import evaluation_batches
from data_pipeline.progress import track
from data_pipeline.read import Dataset
from pretrain.augment import normalize
from pretrain.evals.encoder import Encoder
from pretrain.evals.readout import OWN, Reader, Readout


@dataclass(frozen=True)
class Features:
    """N samples: values [N, D] fp32, labels [N] int64 (all -1 where none were asked for), and their keys."""

    values: Tensor
    labels: Tensor
    keys: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device) -> Features:
        return Features(self.values.to(device), self.labels.to(device), self.keys)


@dataclass(frozen=True)
class Extraction:
    """How features are computed.

    Attributes:
        batch_size: images of one forward pass on this rank.
        precision: of the forward pass; bf16 is autocast. Features are fp32 either way.
        num_workers: loader processes; 0: in this one.
        max_pixels: an image of more is an error.
        readouts: what is taken of the encoder; evaluations that take one feature take the first.
        rank, world_size: this process among those that judge together; every rank calls `extract`.
    """

    batch_size: int = 256
    precision: Literal["fp32", "bf16"] = "fp32"
    num_workers: int = 0
    max_pixels: int = 50_000_000
    readouts: tuple[Readout, ...] = (OWN,)
    rank: int = 0
    world_size: int = 1

    def extract(
        self, encoder: Encoder, dataset: Dataset, *, num_classes: int | None, limit: int | None = None, label: str
    ) -> tuple[Features, ...]:
        """Features of every sample once, in the order of the data set, on the CPU; of each readout.

        Args:
            encoder: on the device it is to run on.
            dataset: with labels in [0, num_classes).
            num_classes: K; None: no labels are read.
            limit: the first samples only; None: all.
            label: of the progress line.

        Raises:
            DataError: an image or a label is missing or cannot be used.
            CheckpointError: the encoder does not give one finite vector per image.
            RunError: not every sample arrived exactly once.
        """
        total = dataset.num_samples if limit is None else min(limit, dataset.num_samples)
        batches = evaluation_batches(
            dataset,
            BatchSpec(image_size=encoder.image_size, num_classes=num_classes),
            encoder.views,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            max_pixels=self.max_pixels,
            limit=total,
        )
        reader = Reader(encoder.module, self.readouts)
        values: list[tuple[Tensor, ...]] = []
        labels: list[Tensor] = []
        keys: list[str] = []
        with untouched(encoder.module), full_precision():
            for batch in track(batches, label=label, total=-(-total // self.batch_size)):
                values.append(self.forward(encoder, reader, batch))
                labels.append(torch.full((len(batch),), -1) if batch.labels is None else batch.labels)
                keys += batch.keys
        if len(keys) != total:
            raise RunError(where=label, expected=f"features of {total} samples, each once", found=f"{len(keys)}")
        return tuple(Features(torch.cat(parts), torch.cat(labels), tuple(keys)) for parts in zip(*values, strict=True))

    def forward(self, encoder: Encoder, reader: Reader, batch: Batch) -> tuple[Tensor, ...]:
        """Each [B, D] fp32 on the CPU."""
        images = normalize(batch.to(encoder.device), encoder.mean, encoder.std).views[0]
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
