"""What of an encoder is taken as the feature of an image: which blocks, and how a block's tokens become one vector."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from data_pipeline.errors import InputError

Pooling = Literal["own", "cls", "mean", "both", "dinov2"]
WITH_CLASS_TOKEN = ("cls", "both", "dinov2")

# Of timm: a last activation stands between NormFreeNet's last map and its pooling; the others' maps come unnormalized.
WITHOUT_MEAN = ("NormFreeNet", "Hiera", "HieraDet")


@dataclass(frozen=True)
class Readout:
    """
    Attributes:
        pooling: own: what the module itself returns; cls: the class token; mean: of the patches (of a ResNet's or
            Swin's map, its positions); both: class token and mean, side by side, of each block; dinov2: the class
            tokens of all blocks and the mean of the last block alone, (blocks + 1) D wide, as DINOv2's own probes.
        blocks: the last so many blocks (stages of a ResNet or Swin), side by side; each after the encoder's last norm,
            where it fits, as DINOv2 takes them (arXiv:2304.07193).
    """

    pooling: Pooling = "own"
    blocks: int = 1

    def __str__(self) -> str:
        return self.pooling if self.blocks == 1 else f"{self.pooling} of the last {self.blocks} blocks"


OWN = Readout()


class Reader(nn.Module):
    """From normalized images [B, 3, S, S] to one feature per readout, each [B, D of that readout].

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
        # open_clip wraps encoders of timm: their blocks are those that are meant.
        self._trunk = getattr(module, "trunk", module)
        self._blocks = max((r.blocks for r in self.readouts if r.pooling != "own"), default=0)
        for readout in self.readouts:
            _check(self._trunk, readout)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        maps = _last_blocks(self._trunk, images, self._blocks) if self._blocks else []
        return tuple(self.module(images) if r == OWN else self._pooled(maps, r) for r in self.readouts)

    def _pooled(self, maps: Sequence[tuple[Tensor | None, Tensor]], readout: Readout) -> Tensor:
        found: list[Tensor] = []
        for number, (prefix, patches) in enumerate(maps[len(maps) - readout.blocks :], 1):
            if readout.pooling in WITH_CLASS_TOKEN:
                assert prefix is not None
                found.append(prefix[:, 0])
            if readout.pooling in ("mean", "both") or (readout.pooling == "dinov2" and number == readout.blocks):
                found.append(patches.mean(dim=1))
        # What pools before its last norm has that still to come: a ViT for every block, a head of stages for the last.
        of_all, of_last = getattr(self._trunk, "fc_norm", None), _norm_of_head(self._trunk)
        if isinstance(of_all, nn.Module):
            found = [of_all(value) for value in found]
        if of_last is not None:
            found[-1] = of_last(found[-1][:, :, None, None]).flatten(1)
        return torch.cat(found, dim=1)


def _norm_of_head(trunk: nn.Module) -> nn.Module | None:
    """Flattens a pooled map [B, D, 1, 1], as ConvNeXt's head has one."""
    norm = getattr(getattr(trunk, "head", None), "norm", None)
    return norm if isinstance(norm, nn.Module) else None


def _last_blocks(trunk: Any, images: Tensor, blocks: int) -> list[tuple[Tensor | None, Tensor]]:
    """Returns the prefix tokens [B, P, D], if there are any, and the patches [B, N, D] of each of the last blocks."""
    if _is_open_clip(trunk):
        found = trunk.forward_intermediates(
            images, indices=blocks, normalize_intermediates=True, intermediates_only=True, output_extra_tokens=True
        )
        prefixes = found.get("image_intermediates_prefix", [None] * blocks)
        return [(prefix, _flat(m)) for prefix, m in zip(prefixes, found["image_intermediates"], strict=True)]
    if _shows_class_token(trunk):
        pairs = trunk.forward_intermediates(
            images, indices=blocks, norm=True, return_prefix_tokens=True, intermediates_only=True
        )
        return [(prefix, _flat(patches)) for patches, prefix in pairs]
    maps = trunk.forward_intermediates(images, indices=blocks, norm=True, intermediates_only=True)
    return [(None, _flat(m)) for m in maps]


def _flat(found: Tensor) -> Tensor:
    """[B, D, H, W] -> [B, H * W, D]."""
    return found.flatten(2).transpose(1, 2)


def _is_open_clip(module: nn.Module) -> bool:
    return type(module).__module__.startswith("open_clip")


def _shows_class_token(trunk: Any) -> bool:
    if _is_open_clip(trunk):
        return hasattr(trunk, "class_embedding")
    has = bool(getattr(trunk, "num_prefix_tokens", 0)) and getattr(trunk, "cls_token", None) is not None
    return has and "return_prefix_tokens" in inspect.signature(trunk.forward_intermediates).parameters


def _pools_last_map(trunk: Any) -> bool:
    """Whether the encoder's own head sees the mean of its last map but for a norm, with no layer in between."""
    if _is_open_clip(trunk):
        return True
    fits = trunk.head_hidden_size == trunk.feature_info[-1]["num_chs"]
    return fits and type(trunk).__name__ not in WITHOUT_MEAN


def _num_blocks(trunk: Any) -> int:
    if _is_open_clip(trunk):
        return len(trunk.transformer.resblocks) if hasattr(trunk, "transformer") else 1
    return len(trunk.feature_info)


def _check(trunk: nn.Module, readout: Readout) -> None:
    if readout.pooling == "own":
        if readout.blocks != 1:
            raise InputError(
                where="--blocks", expected="a pooling to go with it", found=f"{readout.blocks} blocks and none",
                fix="Add --pooling cls, mean, both or dinov2.",
            )  # fmt: skip
        return
    if not hasattr(trunk, "forward_intermediates"):
        raise InputError(
            where="--pooling",
            expected=f"own, as {type(trunk).__name__} does not show its blocks",
            found=readout.pooling,
        )
    if readout.pooling in WITH_CLASS_TOKEN and not _shows_class_token(trunk):
        raise InputError(
            where="--pooling",
            expected=f"own or mean, as {type(trunk).__name__} shows no class token of its blocks",
            found=readout.pooling,
        )
    if readout.pooling == "mean" and not _pools_last_map(trunk):
        raise InputError(
            where="--pooling",
            expected=f"own, as {type(trunk).__name__} makes more of its last map than a normalized mean",
            found=readout.pooling,
        )
    if not 1 <= readout.blocks <= (count := _num_blocks(trunk)):
        raise InputError(where="--blocks", expected=f"between 1 and the encoder's {count}", found=str(readout.blocks))
