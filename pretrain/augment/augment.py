"""From the host's uint8 views to what an objective sees: augmented, normalized and mixed, batched on the device.

Everything random was drawn on the host (data_pipeline/samples/draws.py) and came with the batch. A batch that brings no
draws, as every one for evaluation, is normalized and nothing else. All of it is fp32, whatever precision trains.
Which samples an operation takes is read on the host; the other samples stay as they are, to the bit, and so does
every sample however the batch is cut, on one kind of device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from data_pipeline.batch import Batch, BatchSpec
from data_pipeline.errors import RecipeError
from data_pipeline.samples.config import Augmentation, Mixing
from pretrain.augment.erasing import erase
from pretrain.augment.mixing import mix
from pretrain.augment.photometry import blur, blur_kernels, blur_radius, grayscale, jitter, solarize
from pretrain.augment.rand_augment import rand_augment
from pretrain.augment.selected import apply_to_selected
from pretrain.recipe.recipe import Recipe

_PIXELS_IN_CACHE = 4 * 224 * 224


def augmentations(config: Recipe, needs: BatchSpec) -> tuple[Augmentation, ...]:
    """What is drawn for each of the objective's views: one entry of `data.augment` each, or one for all.

    Raises:
        RecipeError: there are entries for another number of views.
    """
    entries = config.data.augment
    if len(entries) not in (0, 1, needs.num_views):
        expected = "one entry" if needs.num_views == 1 else f"one entry, or {needs.num_views}, one a view"
        problem = f"data.augment: expected {expected} ({config.objective.kind}), found {len(entries)}."
        raise RecipeError(config.name, [problem])
    return entries * needs.num_views if len(entries) == 1 else entries


def mixing(config: Recipe, needs: BatchSpec, micro_size: int) -> Mixing | None:
    """What is drawn for each pair of samples; None: nothing.

    Raises:
        RecipeError: the objective takes no labels, or pairs would be cut apart.
    """
    spec = config.data.mixing
    if not spec.mixup and not spec.cutmix:
        return None
    if needs.num_classes is None:
        problem = f"data.mixing: expected an objective with labels to mix, found {config.objective.kind}."
        raise RecipeError(config.name, [problem])
    if micro_size % 2:
        problem = (
            "batch.micro_size: expected an even number, as data.mixing mixes neighbors in pairs, "
            f"found {micro_size}{'' if config.batch.micro_size else ' (all of a rank)'}."
        )
        raise RecipeError(config.name, [problem])
    return spec


def prepare(
    batch: Batch, device: torch.device, mean: Sequence[float], std: Sequence[float], num_classes: int | None = None
) -> Batch:
    """A batch of the loader as the objective sees it, on `device`.

    Args:
        batch: views [B, 3, H, W] uint8, on the host, with the draws that came with it.
        device: where to.
        mean: per channel, of images scaled to [0, 1].
        std: per channel, likewise, positive.
        num_classes: K of the soft labels, where pairs are mixed.

    Returns:
        views fp32, labels [B, K] fp32 where pairs were mixed, and no draws: they are used up.
    """
    moved = replace(batch, augment={}).to(device)
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        numbered = enumerate(moved.views)
        views = tuple(_finished(view, _of_view(batch.augment, i), mean, std) for i, view in numbered)
        return mix(replace(moved, views=views), batch.augment, num_classes or 0)


def normalize(batch: Batch, mean: Sequence[float], std: Sequence[float]) -> Batch:
    """Every view from uint8 to fp32 (x / 255 - mean) / std, where it lies.

    Args:
        batch: views [B, 3, H, W] uint8, already on the device.
        mean: per channel, of images scaled to [0, 1].
        std: per channel, likewise, positive.

    Raises:
        ValueError: a view is not uint8, so it was normalized before or never was an image.
    """
    return replace(batch, views=tuple(_finished(view, {}, mean, std) for view in batch.views))


def _finished(view: Tensor, drawn: Mapping[str, Tensor], mean: Sequence[float], std: Sequence[float]) -> Tensor:
    if view.dtype != torch.uint8:
        raise ValueError(f"a view to normalize: expected uint8, found {view.dtype}")
    images = torch.empty(view.shape, device=view.device)
    for rows in _blocks(view):
        of_rows = {name: values[rows] for name, values in drawn.items()}
        _write(images[rows], view[rows], of_rows, mean, std)
    return images


def _blocks(view: Tensor) -> list[slice]:
    """The whole batch on a GPU; on a CPU as many images at a time as a core's cache holds, twice as fast."""
    at_once = len(view)
    if view.device.type == "cpu":
        at_once = max(1, _PIXELS_IN_CACHE // (view.shape[2] * view.shape[3]))
    return [slice(first, first + at_once) for first in range(0, len(view), at_once)]


def _write(
    images: Tensor, view: Tensor, drawn: Mapping[str, Tensor], mean: Sequence[float], std: Sequence[float]
) -> None:
    """Augments and normalizes a view into `images`, fp32."""
    if "rand_augment" in drawn:
        view = view.clone()  # on the host, it is the loader's memory
        rand_augment(view, drawn["rand_augment"], drawn["rand_augment_arguments"], fill=mean)
    images.copy_(view).div_(255)
    _change_colors(images, drawn)
    shift = torch.tensor(mean, device=view.device).view(3, 1, 1)
    scale = torch.tensor(std, device=view.device).view(3, 1, 1)
    images.sub_(shift).div_(scale)
    if "erasing" in drawn:
        boxes = drawn["erasing"]
        apply_to_selected(images, boxes[:, 2] > 0, erase, boxes, *_present(drawn, "erasing_noise"))


def _change_colors(images: Tensor, drawn: Mapping[str, Tensor]) -> None:
    """BYOL's order (arXiv:2006.07733, app. B): jitter, grayscale, blur, solarize; in place."""
    if "jitter" in drawn:
        jitter(images, drawn["jitter_order"], drawn["jitter"])
    if "grayscale" in drawn:
        apply_to_selected(images, drawn["grayscale"], grayscale)
    if "blur" in drawn:
        kernels = blur_kernels(drawn["blur"], blur_radius(images.shape[-1]))
        apply_to_selected(images, drawn["blur"] > 0, blur, kernels)
    if "solarize" in drawn:
        apply_to_selected(images, drawn["solarize"], solarize)


def _of_view(drawn: Mapping[str, Tensor], view: int) -> dict[str, Tensor]:
    prefix = f"{view}/"
    return {name.removeprefix(prefix): values for name, values in drawn.items() if name.startswith(prefix)}


def _present(drawn: Mapping[str, Tensor], name: str) -> list[Tensor]:
    return [drawn[name]] if name in drawn else []
