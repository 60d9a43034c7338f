"""What objectives that hide a part of the image share: which encoders they drive, and what they paint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, Self, runtime_checkable

import torch
from timm.layers import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from data_pipeline.batch import Batch, BatchSpec, MaskSpec
from data_pipeline.errors import InputError


@dataclass(frozen=True)
class Reconstruction:
    """Images for a report, each [B, 3, H, W] and normalized as the views are.

    Attributes:
        original: the views.
        masked: what is hidden is zero, the mean color.
        filled: what is hidden is predicted; with normalized targets a prediction has no brightness or
            contrast of its own, and takes the hidden patch's.
    """

    original: Tensor
    masked: Tensor
    filled: Tensor


@runtime_checkable
class Painter(Protocol):
    """An objective that predicts pixels.

    Attributes:
        needs: with the mask of what is hidden.
        normalize_target: what is predicted has no brightness or contrast of its own.
    """

    needs: BatchSpec
    normalize_target: bool

    def eval(self) -> Self: ...
    def reconstruct(self, batch: Batch) -> Reconstruction: ...


def find_painter(objective: nn.Module) -> Painter | None:
    """The objective, or the first in it, that paints; None: none does."""
    return next((module for module in objective.modules() if isinstance(module, Painter)), None)


def checked_masks(batch: Batch, spec: MaskSpec) -> Tensor:
    """The masks of a batch, [B, N] bool, with exactly as many hidden in each as the objective needs.

    Raises:
        ValueError: none, or of another shape.
    """
    masks = batch.masks
    if masks is None or masks.shape != (len(batch), spec.num_patches):
        found = "none" if masks is None else str(tuple(masks.shape))
        raise ValueError(f"batch.masks: expected [{len(batch)}, {spec.num_patches}], found {found}")
    # Asserted on the device: reading the count here would make the host wait for it at every step.
    torch._assert_async((masks.sum(1) == spec.num_hidden).all(), f"each sample must hide {spec.num_hidden} patches")
    return masks


def checked_vit(encoder: nn.Module, method: str) -> VisionTransformer:
    """The encoder, where it is a ViT with plain patches that `method` trains as a whole.

    Raises:
        InputError: it is another, has parameters that only its pooling uses, or drops patches itself.
    """
    if not isinstance(encoder, VisionTransformer) or not isinstance(encoder.patch_embed, PatchEmbed):
        raise InputError(
            where="model.name",
            expected=f"a plain timm ViT, as {method} hides patches",
            found=type(encoder).__name__,
        )
    unused = [n for n, _ in encoder.named_parameters() if n.startswith(("fc_norm.", "attn_pool.", "head"))]
    if unused:
        raise InputError(
            where="model.options",
            expected=f"an encoder that {method} trains as a whole",
            found=f"parameters after the last norm, which would stay random: {', '.join(unused)}",
            fix="Set model.options.global_pool to avg or token, and model.options.fc_norm to false.",
        )
    if not isinstance(encoder.patch_drop, nn.Identity):
        raise InputError(
            where="model.options.patch_drop_rate",
            expected=f"0, as {method} itself hides patches",
            found=str(encoder.patch_drop.prob),
        )
    return encoder
