"""Features of a frozen encoder over whole data sets, without a trace in random state or training flags."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from data_pipeline.batch import Batch, BatchSpec
from data_pipeline.errors import CheckpointError, InputError, RunError
from data_pipeline.loader import evaluation_batches
from data_pipeline.progress import track
from data_pipeline.read import Dataset
from pretrain.augment import normalize
from pretrain.evals.encoder import Encoder


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


def alone(share: Features) -> list[Features]:
    """The shares of all processes where there is one."""
    return [share]


@dataclass(frozen=True)
class Extraction:
    """How features are computed.

    Attributes:
        batch_size: images of one forward pass on this rank.
        precision: of the forward pass; bf16 is autocast. Features are fp32 either way.
        num_workers: loader processes; 0: in this one.
        max_pixels: an image of more is an error.
        rank, world_size: which share of each data set this process computes.
        gather: gives every process the shares of all, in the order of ranks; every rank calls it.
    """

    batch_size: int = 256
    precision: Literal["fp32", "bf16"] = "fp32"
    num_workers: int = 0
    max_pixels: int = 50_000_000
    rank: int = 0
    world_size: int = 1
    gather: Callable[[Features], list[Features]] = alone

    def extract(
        self, encoder: Encoder, dataset: Dataset, *, num_classes: int | None, limit: int | None = None, label: str
    ) -> Features:
        """Features of every sample once, in the order of the data set, on the CPU.

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
        if total < self.world_size:
            raise InputError(where=label, expected=f"at least {self.world_size} samples", found=str(total))
        batches = evaluation_batches(
            dataset,
            BatchSpec(image_size=encoder.image_size, num_classes=num_classes),
            encoder.views,
            batch_size=self.batch_size,
            rank=self.rank,
            world_size=self.world_size,
            num_workers=self.num_workers,
            max_pixels=self.max_pixels,
            limit=total,
        )
        first, end = (total * rank // self.world_size for rank in (self.rank, self.rank + 1))
        num_batches = -(-(end - first) // self.batch_size)
        values: list[Tensor] = []
        labels: list[Tensor] = []
        keys: list[str] = []
        with untouched(encoder.module), full_precision():
            for batch in track(batches, label=label, total=num_batches):
                values.append(self._forward(encoder, batch))
                labels.append(torch.full((len(batch),), -1) if batch.labels is None else batch.labels)
                keys += batch.keys
        shares = self.gather(Features(torch.cat(values), torch.cat(labels), tuple(keys)))
        if (found := sum(map(len, shares))) != total:
            raise RunError(where=label, expected=f"features of {total} samples, each once", found=f"{found} of them")
        return Features(
            torch.cat([share.values for share in shares]),
            torch.cat([share.labels for share in shares]),
            tuple(key for share in shares for key in share.keys),
        )

    def _forward(self, encoder: Encoder, batch: Batch) -> Tensor:
        """[B, D] fp32 on the CPU."""
        images = normalize(batch.to(encoder.device), encoder.mean, encoder.std).views[0]
        with torch.autocast(encoder.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            values: Tensor = encoder.module(images)
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
