"""SimCLR: tell, of each view, which of all other views of the batch shows the same image."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from data_pipeline.batch import Batch, BatchSpec
from pretrain.models.heads import batch_norm_head
from pretrain.objectives.contract import LossOutput, Objective
from pretrain.objectives.siamese import embedding_std
from pretrain.objectives.simclr.config import SimClrConfig
from pretrain.objectives.simclr.loss import nt_xent
from pretrain.runtime.state import Progress


class SimClr(Objective):
    """Chen et al. 2020 (arXiv:2002.05709).

    Both views go through the network together, as in the authors' code: batch norm sees them at once. The head is the
    paper's, linear, ReLU, linear, with batch norm before the ReLU as in the authors' code, which has one more behind
    the last layer.

    Args:
        encoder: from images [B, 3, S, S] to features [B, F], F being its `head_hidden_size`.
        image_size: S, pixels.
        config: widths of the projector, and the temperature.
    """

    coupling = "a loss that compares all views of a batch with each other, and does not add up over micro-batches"

    def __init__(self, encoder: nn.Module, image_size: int, config: SimClrConfig) -> None:
        super().__init__()
        self.needs = BatchSpec(image_size, num_views=2)
        self.temperature = config.temperature
        self.encoder = encoder
        hidden = [config.hidden_width] * (config.projector_layers - 1)
        widths = [int(encoder.head_hidden_size), *hidden, config.out_width]  # type: ignore[arg-type]
        self.projector = batch_norm_head(widths, last="linear")

    def forward(self, batch: Batch, progress: Progress) -> LossOutput:
        """The mean over both views of the local B, each against the views of all ranks; in evaluation mode, local ones.

        Metrics: `view_to_view`, and `embedding_std` of the first view's projections.
        """
        images = torch.cat(batch.views)
        projections: Tensor = self.projector(self.encoder(images)).to(images.dtype)
        first, second = projections.chunk(2)
        with torch.autocast(images.device.type, enabled=False):
            output = nt_xent(first, second, self.temperature, across_ranks=self.training)
        spread = embedding_std(first.detach(), across_ranks=self.training)
        return LossOutput(output.loss, {**output.metrics, "embedding_std": spread})
