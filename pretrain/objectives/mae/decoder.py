"""The decoder of MAE: a narrow ViT over visible tokens and mask tokens; thrown away after pretraining."""

from __future__ import annotations

import torch
from timm.layers import LayerNorm, build_sincos2d_pos_embed
from timm.models.vision_transformer import Block
from torch import Tensor, nn


class MaeDecoder(nn.Module):
    """He et al. 2021 (arXiv:2111.06377), section 3, "MAE decoder".

    Args:
        in_width: width of the encoder's tokens.
        width: width of the decoder, a multiple of 4 and of `heads`.
        depth: number of blocks.
        heads: attention heads of a block.
        grid: patches down and across; N is their product.
        patch_values: values of a patch that are predicted, 3 * patch * patch.
    """

    pos_embed: Tensor

    def __init__(
        self, *, in_width: int, width: int, depth: int, heads: int, grid: tuple[int, int], patch_values: int
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(in_width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        # Fixed, and derived from the shape alone: nothing for a checkpoint to keep.
        self.register_buffer("pos_embed", build_sincos2d_pos_embed(list(grid), width), persistent=False)  # [N, width]
        self.blocks = nn.Sequential(*(Block(width, heads, qkv_bias=True) for _ in range(depth)))
        self.norm = LayerNorm(width)
        self.head = nn.Linear(width, patch_values)

    def forward(self, tokens: Tensor, visible: Tensor, hidden: Tensor) -> Tensor:
        """Predicts the hidden patches.

        Positions are in the embeddings alone and attention does not see order, so tokens are never put back
        into the order of the image.

        Args:
            tokens: the encoder's, prefix (class, registers) before visible patches, [B, P + V, in_width].
            visible: index of the patch of each visible token, [B, V] int64.
            hidden: index of each patch to predict, [B, H] int64; V + H = N.

        Returns:
            [B, H, patch_values], in the order of `hidden`.
        """
        prefix, seen = self.embed(tokens).tensor_split([tokens.shape[1] - visible.shape[1]], dim=1)
        guessed = self.mask_token + self.pos_embed[hidden]
        x = self.blocks(torch.cat([prefix, seen + self.pos_embed[visible], guessed], dim=1))
        prediction: Tensor = self.head(self.norm(x[:, -hidden.shape[1] :]))
        return prediction
