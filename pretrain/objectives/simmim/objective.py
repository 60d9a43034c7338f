"""SimMIM: replace most of an image's patches by a token, encode all of it, predict the pixels that were hidden."""

from __future__ import annotations

import math

import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import Tensor, nn
from torch.nn import functional as F

from data_pipeline.batch import Batch, BatchSpec, MaskSpec
from data_pipeline.errors import InputError
from pretrain.objectives.contract import LossOutput, Objective
from pretrain.objectives.masked import Reconstruction, checked_masks, checked_vit
from pretrain.objectives.simmim.config import SimmimConfig
from pretrain.runtime.state import Progress


class Simmim(Objective):
    """Xie et al. 2021 (arXiv:2111.09886).

    The encoder is an unmodified timm ViT or Swin, driven from outside: its patch embedding, in which hidden
    patches become one learned token, then all else of it up to its last norm. Masks are drawn in blocks of
    `mask_patch` pixels, G x G of them, whatever the encoder's patches; each of these lies in one block. One
    linear layer predicts the stride x stride pixels of each of the encoder's last tokens.

    Weights start as in the authors' code: a Swin's as timm's, a ViT's as of `_initialize`. One departure: their ViT has
    relative positions shared by its blocks, timm's has learned absolute ones.

    Raises:
        InputError: the encoder is no ViT with plain patches and no Swin, or has parameters that only its pooling
            uses; blocks that do not tile the image, or patches that do not tile a block; a mask ratio that
            hides all or nothing.
    """

    normalize_target = False

    def __init__(self, encoder: nn.Module, image_size: int, config: SimmimConfig) -> None:
        super().__init__()
        swin = isinstance(encoder, SwinTransformer | SwinTransformerV2)
        vit = encoder if swin else checked_vit(encoder, "SimMIM")
        patch: int = vit.patch_embed.patch_size[0]  # type: ignore[union-attr, index, assignment]
        self.stride = patch * 2 ** (len(encoder.layers) - 1) if swin else patch  # type: ignore[arg-type]
        self.mask_patch, self.patches_a_block = config.mask_patch, config.mask_patch // patch
        _check_sizes(image_size, patch, self.stride, config)
        num_blocks = (image_size // config.mask_patch) ** 2
        num_hidden = math.ceil(round(config.mask_ratio * num_blocks, 9))  # as theirs, but for 0.55 * 100 > 55
        _check_hidden(num_blocks, num_hidden, config)
        self.encoder = encoder
        self.needs = BatchSpec(image_size, mask=MaskSpec(num_blocks, num_hidden))
        width: int = vit.patch_embed.proj.out_channels  # type: ignore[union-attr, assignment]
        self.mask_token = nn.Parameter(torch.zeros(width))
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        if not swin:
            self._initialize(vit)
        self.head = nn.Conv2d(int(encoder.num_features), 3 * self.stride**2, kernel_size=1)  # type: ignore[arg-type]

    @torch.no_grad()
    def _initialize(self, vit: nn.Module) -> None:
        """Normal of deviation 0.02, cut at one deviation, which leaves 0.0108; and as in BEiT what block l of 1, 2, ...
        adds to the stream is divided by sqrt(2 l).
        """
        for module in vit.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                _narrow_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for token in (vit.cls_token, vit.pos_embed, self.mask_token):
            if token is not None:
                _narrow_(token)  # type: ignore[arg-type]
        for number, block in enumerate(vit.blocks, start=1):  # type: ignore[arg-type]
            for last in (block.attn.proj, block.mlp.fc2):
                last.weight.div_(math.sqrt(2 * number))

    def forward(self, batch: Batch, progress: Progress) -> LossOutput:
        """Mean absolute error over the hidden pixels (Eq. 1).

        Every sample hides the same number of blocks, so that this mean over the local B can be averaged over
        micro-batches and ranks. The authors' code adds 1e-5 to the number of pixels, which would not add up.
        """
        images = batch.views[0]
        hidden = self._hidden(batch)
        error = (self.predict(images, hidden) - images).abs() * _spread(hidden, self.mask_patch).unsqueeze(1)
        assert self.needs.mask is not None
        num_values = len(batch) * self.needs.mask.num_hidden * 3 * self.mask_patch**2
        return LossOutput(error.sum() / num_values)

    def predict(self, images: Tensor, hidden: Tensor) -> Tensor:
        """Every pixel, from the patches that are not hidden.

        Args:
            images: normalized, [B, 3, S, S].
            hidden: blocks of `mask_patch` pixels, [B, G, G] bool.

        Returns:
            [B, 3, S, S], of the type of `images`.
        """
        predicted: Tensor = F.pixel_shuffle(self.head(self.encode(images, hidden)), self.stride)
        return predicted.to(images.dtype)  # from bf16, where autocast computed in it

    def encode(self, images: Tensor, hidden: Tensor) -> Tensor:
        """The encoder's last tokens, normed, as an image of features: [B, D, S / stride, S / stride]."""
        encoder = self.encoder
        at = _spread(hidden, self.patches_a_block).unsqueeze(-1)  # [B, S / patch, S / patch, 1]
        patches = encoder.patch_embed(images)  # type: ignore[operator]
        if isinstance(encoder, SwinTransformer | SwinTransformerV2):
            tokens: Tensor = encoder.norm(encoder.layers(torch.where(at, self.mask_token, patches)))  # [B, H, W, D]
            return tokens.permute(0, 3, 1, 2)
        patches = encoder._pos_embed(torch.where(at.flatten(1, 2), self.mask_token, patches))  # type: ignore[operator]
        tokens = encoder.norm(encoder.blocks(encoder.norm_pre(patches)))  # type: ignore[operator]
        tokens = tokens[:, encoder.num_prefix_tokens :]
        return tokens.transpose(1, 2).reshape(len(images), -1, *at.shape[1:3])

    @torch.no_grad()
    def reconstruct(self, batch: Batch) -> Reconstruction:
        """The views with hidden blocks blanked, and with them predicted; training mode is the caller's."""
        images = batch.views[0]
        hidden = self._hidden(batch)
        pixels = _spread(hidden, self.mask_patch).unsqueeze(1)
        filled = torch.where(pixels, self.predict(images, hidden), images)
        return Reconstruction(images, images.masked_fill(pixels, 0.0), filled)

    def _hidden(self, batch: Batch) -> Tensor:
        """Which blocks are hidden, [B, G, G] bool."""
        assert self.needs.mask is not None
        side = math.isqrt(self.needs.mask.num_patches)
        return checked_masks(batch, self.needs.mask).view(-1, side, side)


def _narrow_(tensor: Tensor) -> None:
    nn.init.trunc_normal_(tensor, std=0.02, a=-0.02, b=0.02)


def _spread(hidden: Tensor, times: int) -> Tensor:
    """Each of [B, G, G] as times x times equal ones."""
    return hidden.repeat_interleave(times, 1).repeat_interleave(times, 2)


def _check_sizes(size: int, patch: int, stride: int, config: SimmimConfig) -> None:
    if config.mask_patch % patch:
        above = -(-config.mask_patch // patch) * patch
        raise InputError(
            where="objective.mask_patch",
            expected=f"a multiple of the encoder's patch size {patch}",
            found=str(config.mask_patch),
            fix=f"Nearest above: {above}.",
        )
    for side, what in ((config.mask_patch, "objective.mask_patch"), (stride, "the encoder's stride")):
        if size % side:
            raise InputError(
                where="model.image_size",
                expected=f"a multiple of {what} {side}",
                found=str(size),
                fix=f"Nearest above: {-(-size // side) * side}.",
            )


def _check_hidden(num_blocks: int, num_hidden: int, config: SimmimConfig) -> None:
    if num_hidden == num_blocks:
        raise InputError(
            where="objective.mask_ratio",
            expected=f"to hide some and show some of {num_blocks} blocks of {config.mask_patch} pixels",
            found=f"{config.mask_ratio}, which hides {num_hidden}",
        )
