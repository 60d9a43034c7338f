"""A small objective with what makes engines stumble: two parameter groups, odd sizes, dropout, batch norm."""

from __future__ import annotations

import torch
from torch import nn

from data_pipeline.batch import Batch, BatchSpec
from pretrain.objectives.contract import LossOutput, Objective
from pretrain.runtime.state import Progress


class ToyEncoder(nn.Sequential):
    """Says what its layers are, as timm's encoders do: each module is one."""

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        return {"stem": r"^1\.", "blocks": r"^(\d+)\."}


class Toy(Objective):
    """[B, 3, 5, 5] -> 7 -> 11 -> 3 classes; sizes that no world size divides."""

    def __init__(self, seed: int = 0, dropout: float = 0.0, batch_norm: bool = False) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.needs = BatchSpec(image_size=5, num_classes=3)
        norm: nn.Module = nn.BatchNorm1d(11) if batch_norm else nn.LayerNorm(11)
        self.encoder = ToyEncoder(nn.Flatten(), nn.Linear(75, 7), nn.GELU(), nn.Linear(7, 11), norm)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(11, 3)

    def forward(self, batch: Batch, progress: Progress) -> LossOutput:
        assert batch.labels is not None
        logits = self.head(self.dropout(self.encoder(batch.views[0])))
        loss = nn.functional.cross_entropy(logits.float(), batch.labels)
        return LossOutput(loss + float("inf") if "infinite" in batch.keys else loss)


def toy_batch(step: int, size: int = 8) -> Batch:
    """The global batch of a step, a function of the step alone."""
    generator = torch.Generator().manual_seed(step)
    return Batch(
        keys=tuple(f"{step}-{i}" for i in range(size)),
        views=(torch.randn(size, 3, 5, 5, generator=generator),),
        labels=torch.randint(0, 3, (size,), generator=generator),
    )


def split(batch: Batch, rank: int, world_size: int, accumulation: int) -> tuple[Batch, ...]:
    """This rank's micro-batches: W equal pieces, then pieces of those."""
    piece = len(batch) // world_size
    micro = piece // accumulation
    starts = range(rank * piece, (rank + 1) * piece, micro)
    assert batch.labels is not None
    return tuple(
        Batch(batch.keys[s : s + micro], (batch.views[0][s : s + micro],), labels=batch.labels[s : s + micro])
        for s in starts
    )
