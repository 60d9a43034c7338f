"""Masked autoencoder: hide most patches, encode the rest, predict the pixels of the hidden ones."""

from __future__ import annotations

import torch
from timm.layers import build_sincos2d_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from data_pipeline.batch import Batch, BatchSpec, MaskSpec
from data_pipeline.errors import InputError
from pretrain.objectives.contract import LossOutput, Objective
from pretrain.objectives.mae.config import MaeConfig
from pretrain.objectives.mae.decoder import MaeDecoder
from pretrain.objectives.masked import Reconstruction, checked_masks, checked_vit
from pretrain.runtime.state import Progress


class Mae(Objective):
    """He et al. 2021 (arXiv:2111.06377).

    The encoder is an unmodified timm ViT, driven from outside: its patch and position embedding, then its
    blocks and its norm over prefix tokens (class, registers) and visible patches. Weights start as in the
    paper (Xavier-uniform, sine-cosine positions). One departure: positions remain the learned parameter that
    they are in timm, where the paper fixes them, so that an encoder has no frozen parameters.

    Raises:
        InputError: the encoder is no ViT with plain patches, or has parameters that only its pooling uses; a
            width, a number of heads or the mask ratio cannot be.
    """

    def __init__(self, encoder: nn.Module, image_size: int, config: MaeConfig) -> None:
        super().__init__()
        vit = checked_vit(encoder, "MAE")
        num_patches: int = vit.patch_embed.num_patches
        num_hidden = round(config.mask_ratio * num_patches)
        _check_sizes(vit.embed_dim, num_patches, num_hidden, config)
        self.encoder = encoder
        self.patch_size: int = vit.patch_embed.patch_size[0]
        self.normalize_target = config.normalize_target
        self.needs = BatchSpec(image_size, mask=MaskSpec(num_patches, num_hidden))
        self.decoder = MaeDecoder(
            in_width=vit.embed_dim, width=config.decoder_width, depth=config.decoder_depth, heads=config.decoder_heads,
            grid=vit.patch_embed.grid_size, patch_values=3 * self.patch_size**2,
        )  # fmt: skip
        self._initialize(vit)

    def forward(self, batch: Batch, progress: Progress) -> LossOutput:
        """Mean squared error over the values of the hidden patches.

        Every sample hides the same number of patches, so that this mean over the local B can be averaged
        over micro-batches and ranks.
        """
        images = batch.views[0]
        visible, hidden = self._split(batch)
        prediction = self.decoder(self.encode(images, visible), visible, hidden)
        target = _take(patchify(images, self.patch_size), hidden)
        if self.normalize_target:
            mean, std = _moments(target)
            target = (target - mean) / std
        return LossOutput((prediction.to(target.dtype) - target).square().mean())

    def encode(self, images: Tensor, visible: Tensor) -> Tensor:
        """Encodes some patches of each image as if there were no others.

        Args:
            images: normalized, [B, 3, S, S].
            visible: index of the patches to encode, [B, V] int64.

        Returns:
            Normed tokens, the encoder's P prefix tokens first, [B, P + V, D].
        """
        vit: VisionTransformer = self.encoder
        tokens = vit._pos_embed(vit.patch_embed(images))  # [B, P + N, D]
        prefix, patches = tokens.tensor_split([vit.num_prefix_tokens], dim=1)
        tokens = vit.norm_pre(torch.cat([prefix, _take(patches, visible)], dim=1))
        encoded: Tensor = vit.norm(vit.blocks(tokens))
        return encoded

    @torch.no_grad()
    def reconstruct(self, batch: Batch) -> Reconstruction:
        """The views with hidden patches blanked, and with them predicted; training mode is the caller's."""
        images = batch.views[0]
        visible, hidden = self._split(batch)
        prediction = self.decoder(self.encode(images, visible), visible, hidden).to(images.dtype)
        patches = patchify(images, self.patch_size)
        if self.normalize_target:
            mean, std = _moments(_take(patches, hidden))
            prediction = prediction * std + mean
        at = hidden.unsqueeze(-1).expand_as(prediction)
        masked = unpatchify(patches.scatter(1, at, 0.0), self.patch_size)
        filled = unpatchify(patches.scatter(1, at, prediction), self.patch_size)
        return Reconstruction(images, masked, filled)

    def _split(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Indices of visible and of hidden patches, [B, V] and [B, H], both ascending."""
        spec = self.needs.mask
        assert spec is not None
        order = checked_masks(batch, spec).to(torch.uint8).argsort(dim=1, stable=True)
        visible, hidden = order.tensor_split([spec.num_patches - spec.num_hidden], dim=1)
        return visible, hidden

    @torch.no_grad()
    def _initialize(self, vit: VisionTransformer) -> None:
        """As the authors' code does: without it small and large widths start at very different scales."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(vit.patch_embed.proj.weight.flatten(1))
        for name, parameter in self.named_parameters():
            if name.endswith("_token"):
                nn.init.normal_(parameter, std=0.02)
        if vit.pos_embed is not None:
            positions = build_sincos2d_pos_embed(list(vit.patch_embed.grid_size), vit.embed_dim)
            vit.pos_embed.zero_()  # of prefix tokens, where they have any
            vit.pos_embed[0, -len(positions) :] = positions


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """[B, 3, H, W] -> [B, N, 3 * patch * patch]; patches row by row, values of one by (channel, y, x)."""
    return F.pixel_unshuffle(images, patch_size).flatten(2).transpose(1, 2)


def unpatchify(patches: Tensor, patch_size: int) -> Tensor:
    """The inverse of `patchify` for square images."""
    side = round(patches.shape[1] ** 0.5)
    return F.pixel_shuffle(patches.transpose(1, 2).reshape(len(patches), -1, side, side), patch_size)


def _take(tokens: Tensor, index: Tensor) -> Tensor:
    """Row `index[b, i]` of `tokens[b]`: [B, N, D], [B, M] -> [B, M, D]."""
    return tokens.gather(1, index.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def _moments(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and sqrt(var + 1e-6) of each patch, [B, N, 1]; unbiased variance, as in the authors' code."""
    var, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return mean, (var + 1e-6).sqrt()


def _check_sizes(width: int, num_patches: int, num_hidden: int, config: MaeConfig) -> None:
    if not 0 < num_hidden < num_patches:
        raise InputError(
            where="objective.mask_ratio",
            expected=f"to hide some and show some of {num_patches} patches",
            found=f"{config.mask_ratio}, which hides {num_hidden}",
        )
    for where, value in (("model.options.embed_dim", width), ("objective.decoder_width", config.decoder_width)):
        if value % 4:
            raise InputError(where, "a multiple of 4, for sine-cosine positions in two dimensions", str(value))
