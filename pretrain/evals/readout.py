"""What of an encoder is taken as the feature of an image: which blocks, and how a block's tokens become one vector."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from data_pipeline.errors import InputError

Pooling = Literal["own", "cls", "mean", "both"]


@dataclass(frozen=True)
class Readout:
    """
    Attributes:
        pooling: own: what the module itself returns; cls: the class token; mean: of the patches (of a ResNet's or
            Swin's map, its positions); both: class token and mean, side by side.
        blocks: the last so many blocks (stages of a ResNet or Swin), side by side; each after the encoder's last norm,
            where it fits, as DINOv2 takes them (arXiv:2304.07193).
    """

    pooling: Pooling = "own"
    blocks: int = 1

    def __str__(self) -> str:
        return self.pooling if self.blocks == 1 else f"{self.pooling} of the last {self.blocks} blocks"


OWN = Readout()


class Reader(nn.Module):
    """From normalised images [B, 3, S, S] to one feature per readout, each [B, D of that readout].

    All readouts of blocks come from one forward pass; the module's own output costs one of its own.

    Args:
        module: the encoder.
        readouts: what is taken of it.

    Raises:
        InputError: something that the encoder does not have.
    """

    def __init__(self, module: nn.Module, readouts: Sequence[Readout]) -> None:
        super().__init__()
        self.module, self.readouts = module, tuple(readouts)
        self._blocks = max((r.blocks for r in self.readouts if r.pooling != "own"), default=0)
        for readout in self.readouts:
            _check(module, readout)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        maps = _last_blocks(self.module, images, self._blocks) if self._blocks else []
        return tuple(self.module(images) if r == OWN else self._pooled(maps, r) for r in self.readouts)

    def _pooled(self, maps: Sequence[tuple[Tensor | None, Tensor]], readout: Readout) -> Tensor:
        found: list[Tensor] = []
        for prefix, patches in maps[len(maps) - readout.blocks :]:
            if readout.pooling in ("cls", "both"):
                assert prefix is not None
                found.append(prefix[:, 0])
            if readout.pooling in ("mean", "both"):
                found.append(patches.mean(dim=1))
        # Of a ViT that pools before its last norm, that norm is still to come; the identity in every other.
        last = getattr(self.module, "fc_norm", None)
        return torch.cat([last(value) if isinstance(last, nn.Module) else value for value in found], dim=1)


def _last_blocks(module: Any, images: Tensor, blocks: int) -> list[tuple[Tensor | None, Tensor]]:
    """Of each of the last blocks its prefix tokens [B, P, D], where it has any, and its patches [B, N, D]."""
    if _is_open_clip(module):
        found = module.forward_intermediates(
            images, indices=blocks, normalize_intermediates=True, intermediates_only=True, output_extra_tokens=True
        )
        prefixes = found.get("image_intermediates_prefix", [None] * blocks)
        return [(prefix, _flat(m)) for prefix, m in zip(prefixes, found["image_intermediates"], strict=True)]
    if _has_class_token(module):
        pairs = module.forward_intermediates(
            images, indices=blocks, norm=True, return_prefix_tokens=True, intermediates_only=True
        )
        return [(prefix, _flat(patches)) for patches, prefix in pairs]
    maps = module.forward_intermediates(images, indices=blocks, norm=True, intermediates_only=True)
    return [(None, _flat(m)) for m in maps]


def _flat(found: Tensor) -> Tensor:
    """[B, D, H, W] -> [B, H * W, D]."""
    return found.flatten(2).transpose(1, 2)


def _is_open_clip(module: nn.Module) -> bool:
    return type(module).__module__.startswith("open_clip")


def _has_class_token(module: Any) -> bool:
    if _is_open_clip(module):
        return hasattr(module, "class_embedding")
    return bool(getattr(module, "num_prefix_tokens", 0)) and getattr(module, "cls_token", None) is not None


def _num_blocks(module: Any) -> int:
    if _is_open_clip(module):
        return len(module.transformer.resblocks) if hasattr(module, "transformer") else 1
    if hasattr(module, "num_prefix_tokens"):
        return len(module.blocks)
    return len(module.feature_info)


def _check(module: nn.Module, readout: Readout) -> None:
    if readout.pooling == "own":
        if readout.blocks != 1:
            raise InputError(
                where="--blocks", expected="a pooling to go with it", found=f"{readout.blocks} blocks and none",
                fix="Add --pooling cls, mean or both.",
            )  # fmt: skip
        return
    if not hasattr(module, "forward_intermediates"):
        raise InputError(
            where="--pooling",
            expected=f"own, as {type(module).__name__} does not show its blocks",
            found=readout.pooling,
        )
    if readout.pooling in ("cls", "both") and not _has_class_token(module):
        raise InputError(
            where="--pooling",
            expected=f"own or mean, as {type(module).__name__} has no class token",
            found=readout.pooling,
        )
    if not 1 <= readout.blocks <= (count := _num_blocks(module)):
        raise InputError(where="--blocks", expected=f"between 1 and the encoder's {count}", found=str(readout.blocks))
