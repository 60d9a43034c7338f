"""What an objective that paints makes of images it sees in part, as pictures of a report."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_pipeline.datasets.dataset import Dataset
from data_pipeline.loader import evaluation_batches
from pretrain.augment.augment import normalize
from pretrain.objectives.masked import Painter
from pretrain.recipe.recipe import Data
from pretrain.reports.report_figures import Picture, picture


def draw_reconstructions(painter: Painter, dataset: Dataset, data: Data, num_images: int) -> list[list[Picture]]:
    """Draws rows of an original, what is left of it, and what the model makes of that.

    Args:
        painter: with the weights of the run, on the CPU.
        dataset: whose first images are taken; their masks depend on their keys alone.
        data: the recipe's group, for its evaluation views and statistics.
        num_images: rows.
    """
    batches = evaluation_batches(
        dataset,
        painter.needs,
        data.preprocessing(painter.needs.image_size),
        batch_size=num_images,
        max_pixels=data.max_pixels,
        limit=num_images,
    )
    batch = normalize(next(batches).kept(), data.mean, data.std)
    shown = painter.eval().reconstruct(batch)
    columns = [
        [picture(_pixels(image, data.mean, data.std)) for image in images]
        for images in (shown.original, shown.masked, shown.filled)
    ]
    return [list(row) for row in zip(*columns, strict=True)]


def _pixels(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> NDArray[np.uint8]:
    """A normalized image [3, H, W] as uint8 [H, W, 3]."""
    scaled = image * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)
    pixels: NDArray[np.uint8] = (scaled * 255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
    return pixels
