"""What travels: a Sample out of a shard, a Batch into an objective, and the BatchSpec between them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:  # to open a data set takes no torch
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """One sample as it lies in a shard: the member's bytes by field name (`jpg`, `cls`, `txt`, ...).

    `label` is one that lies beside the shard, and takes the place of that in `cls`: a number, or soft, [K] fp32.
    """

    key: str
    fields: Mapping[str, bytes]
    label: int | NDArray[np.float32] | None = None


@dataclass(frozen=True)
class MaskSpec:
    """Random masks, drawn on the host per sample: exactly `num_hidden` of `num_patches` are hidden.

    What a patch is, is the objective's to say: one of the encoder's, or a larger block of pixels.
    """

    num_patches: int
    num_hidden: int


@dataclass(frozen=True)
class TokenSpec:
    """Captions as tokens, [context_length] a sample, made on the host by the tokenizer of this name."""

    tokenizer: str
    context_length: int
    # Tokens lie below; None: whatever the tokenizer has. Checked where it is built, of no interest to a loader.
    vocab_size: int | None = field(default=None, compare=False)
    clean: str = field(default="whitespace", compare=False)  # open_clip's word for what is done to a text before


@dataclass(frozen=True)
class BatchSpec:
    """What an objective needs of a batch; checked against the data before anything starts.

    Attributes:
        image_size: side of each square view, pixels.
        num_views: views per sample.
        num_classes: labels are needed, each in [0, num_classes); None: no labels.
        mask: patch masks are needed; None: no masks.
        tokens: captions are needed, as tokens; None: no captions.
    """

    image_size: int
    num_views: int = 1
    num_classes: int | None = None
    mask: MaskSpec | None = None
    tokens: TokenSpec | None = None


@dataclass(frozen=True)
class LeftOut:
    """A sample that an evaluation cannot use: its row in the batch, its key, the file it lies in, and why."""

    row: int
    key: str
    file: str
    reason: str


@dataclass(frozen=True)
class Batch:
    """B samples on one rank. Shapes: B samples, N patches, L tokens, K classes."""

    keys: tuple[str, ...]  # for tracing a bad loss to a sample
    views: tuple[Tensor, ...]  # each [B, 3, H, W], uint8 until augmented on the device
    labels: Tensor | None = None  # [B] int64, or [B, K] soft
    weights: Tensor | None = None  # [B] fp32, of each sample in the loss
    tokens: Tensor | None = None  # [B, L] int64
    masks: Tensor | None = None  # [B, N] bool, True = hidden
    augment: dict[str, Tensor] = field(default_factory=dict)  # per-sample parameters the host drew, [B, ...]
    left_out: tuple[LeftOut, ...] = ()  # of an evaluation: rows that are blank, and count for nothing
    undrawn_crops: int = 0  # views whose crop was not drawn, as none by the recipe's geometry fitted in the image

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`; copies do not block where the memory is pinned."""
        from torch import Tensor

        moved: dict[str, object] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Tensor):
                moved[f.name] = value.to(device, non_blocking=True)
            elif f.name == "views":
                moved[f.name] = tuple(view.to(device, non_blocking=True) for view in value)
            elif f.name == "augment":
                moved[f.name] = {name: t.to(device, non_blocking=True) for name, t in value.items()}
        return replace(self, **moved)  # type: ignore[arg-type]

    def kept(self) -> Batch:
        """The samples that are not left out; no augmentation is drawn for an evaluation."""
        if not self.left_out:
            return self
        import torch

        blank = {one.row for one in self.left_out}
        rows = torch.tensor([row for row in range(len(self)) if row not in blank], dtype=torch.int64)
        return Batch(
            keys=tuple(self.keys[row] for row in rows.tolist()),
            views=tuple(view[rows] for view in self.views),
            labels=None if self.labels is None else self.labels[rows],
            tokens=None if self.tokens is None else self.tokens[rows],
            masks=None if self.masks is None else self.masks[rows],
        )

    def pin_memory(self) -> Batch:
        """Called by torch's DataLoader in its pinning thread."""
        from torch import Tensor

        pinned: dict[str, object] = {
            f.name: getattr(self, f.name).pin_memory()
            for f in fields(self)
            if isinstance(getattr(self, f.name), Tensor)
        }
        pinned["views"] = tuple(view.pin_memory() for view in self.views)
        pinned["augment"] = {name: t.pin_memory() for name, t in self.augment.items()}
        return replace(self, **pinned)  # type: ignore[arg-type]
