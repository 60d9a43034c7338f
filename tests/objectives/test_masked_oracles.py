"""MAE and SimMIM give the losses of Hugging Face's models with the same weights, images and masks; small, random."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    SwinConfig,
    SwinForMaskedImageModeling,
    ViTConfig,
    ViTForMaskedImageModeling,
    ViTMAEConfig,
    ViTMAEForPreTraining,
)

from data_pipeline.batch import Batch
from pretrain.objectives.config import ObjectiveConfig
from pretrain.objectives.contract import Objective
from pretrain.objectives.kinds import build_objective
from pretrain.objectives.mae.config import MaeConfig
from pretrain.objectives.simmim.config import SimmimConfig
from pretrain.recipe import recipe
from pretrain.runtime.state import Progress

START = Progress(0, 1, 0)
VIT = recipe.Model(
    name="vit_tiny_patch16_224",
    image_size=8,
    patch_size=2,
    options={"embed_dim": 8, "depth": 2, "num_heads": 2, "global_pool": "avg", "fc_norm": False},
)
THEIR_VIT = {
    "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
    "image_size": 8, "patch_size": 2, "layer_norm_eps": 1e-6, "attn_implementation": "eager",
}  # fmt: skip
BLOCK = {
    "norm1": "layernorm_before", "attn.proj": "attention.o_proj", "norm2": "layernorm_after",
    "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2",
}  # fmt: skip


def make(model: recipe.Model, config: ObjectiveConfig) -> tuple[Objective, Batch]:
    """Every weight off its start."""
    torch.manual_seed(0)
    objective = build_objective(model, config).eval()
    with torch.no_grad():
        for p in objective.parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
    spec = objective.needs.mask
    assert spec is not None
    masks = torch.rand(3, spec.num_patches).argsort(1) < spec.num_hidden
    images = torch.randn(3, 3, model.image_size, model.image_size, requires_grad=True)
    return objective, Batch(tuple("abc"), (images,), masks=masks)


def block(state: dict[str, Tensor], ours: str, theirs: str) -> dict[str, Tensor]:
    """A transformer block: they keep queries, keys and values apart."""
    found = {
        f"{theirs}.{name}.{kind}": state[f"{ours}.{part}.{kind}"]
        for part, name in BLOCK.items()
        for kind in ("weight", "bias")
    }
    for kind in ("weight", "bias"):
        for name, value in zip("qkv", state[f"{ours}.attn.qkv.{kind}"].chunk(3), strict=True):
            found[f"{theirs}.attention.{name}_proj.{kind}"] = value
    return found


def vit(state: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {
        "vit.embeddings.cls_token": state["encoder.cls_token"],
        "vit.embeddings.position_embeddings": state["encoder.pos_embed"],
    }
    for kind in ("weight", "bias"):
        found[f"vit.embeddings.patch_embeddings.projection.{kind}"] = state[f"encoder.patch_embed.proj.{kind}"]
        found[f"vit.layernorm.{kind}"] = state[f"encoder.norm.{kind}"]
    for i in range(2):
        found |= block(state, f"encoder.blocks.{i}", f"vit.layers.{i}")
    return found


def assert_equal_losses(objective: Objective, batch: Batch, theirs: nn.Module, **given: Tensor) -> None:
    """And equal gradients with respect to the images, which go through all of it."""
    images = batch.views[0]
    loss, expected = objective(batch, START).loss, theirs.eval()(images, **given).loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    (gradient,), (expected_gradient,) = torch.autograd.grad(loss, images), torch.autograd.grad(expected, images)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("normalize", [True, False])
def test_mae(normalize: bool) -> None:
    config = MaeConfig(kind="mae", decoder_width=12, decoder_depth=1, decoder_heads=3, normalize_target=normalize)
    objective, batch = make(VIT, config)
    theirs = ViTMAEForPreTraining(
        ViTMAEConfig(
            **THEIR_VIT, mask_ratio=0.75, norm_pix_loss=normalize, decoder_hidden_size=12,
            decoder_num_hidden_layers=1, decoder_num_attention_heads=3, decoder_intermediate_size=48,
        )
    )  # fmt: skip
    state = objective.state_dict()
    weights = vit(state) | block(state, "decoder.blocks.0", "decoder.decoder_layers.0")
    positions = objective.decoder.pos_embed  # type: ignore[union-attr]
    assert isinstance(positions, Tensor)
    weights["decoder.decoder_pos_embed"] = torch.cat([torch.zeros(1, 12), positions])[None]
    weights["decoder.mask_token"] = state["decoder.mask_token"]
    for kind in ("weight", "bias"):
        weights[f"decoder.decoder_embed.{kind}"] = state[f"decoder.embed.{kind}"]
        weights[f"decoder.decoder_norm.{kind}"] = state[f"decoder.norm.{kind}"]
        by_channel = state[f"decoder.head.{kind}"].unflatten(0, (3, 2, 2))  # their channels come last
        weights[f"decoder.decoder_pred.{kind}"] = by_channel.movedim(0, 2).flatten(0, 2)
    theirs.load_state_dict(weights)
    assert batch.masks is not None
    order = torch.arange(16) / 100  # they keep the smallest, in their order
    assert_equal_losses(objective, batch, theirs, noise=batch.masks + order)


def test_simmim_over_a_vit() -> None:
    objective, batch = make(VIT, SimmimConfig(kind="simmim", mask_patch=2))
    theirs = ViTForMaskedImageModeling(ViTConfig(**THEIR_VIT, encoder_stride=2))
    state = objective.state_dict()
    weights = vit(state) | {"vit.embeddings.mask_token": state["mask_token"][None, None]}
    weights |= {f"decoder.0.{kind}": state[f"head.{kind}"] for kind in ("weight", "bias")}
    theirs.load_state_dict(weights)
    assert batch.masks is not None
    assert_equal_losses(objective, batch, theirs, bool_masked_pos=batch.masks)


def test_simmim_over_a_swin() -> None:
    """Blocks of 8 pixels over patches of 2: the mask that the objective spreads, they are given spread."""
    model = recipe.Model(
        name="swin_tiny_patch4_window7_224",
        image_size=16,
        patch_size=2,
        options={"embed_dim": 8, "depths": (2, 1), "num_heads": (1, 2), "window_size": 4, "drop_path_rate": 0.0},
    )
    objective, batch = make(model, SimmimConfig(kind="simmim", mask_patch=8, mask_ratio=0.5))
    theirs = SwinForMaskedImageModeling(
        SwinConfig(
            image_size=16, patch_size=2, embed_dim=8, depths=[2, 1], num_heads=[1, 2], window_size=4,
            encoder_stride=4, drop_path_rate=0.0, attn_implementation="eager",
        )
    )  # fmt: skip
    state = objective.state_dict()
    weights = {"swin.embeddings.mask_token": state["mask_token"][None, None]}
    for kind in ("weight", "bias"):
        weights[f"swin.embeddings.patch_embeddings.projection.{kind}"] = state[f"encoder.patch_embed.proj.{kind}"]
        weights[f"swin.embeddings.norm.{kind}"] = state[f"encoder.patch_embed.norm.{kind}"]
        weights[f"swin.encoder.layers.0.downsample.norm.{kind}"] = state[f"encoder.layers.1.downsample.norm.{kind}"]
        weights[f"swin.layernorm.{kind}"] = state[f"encoder.norm.{kind}"]
        weights[f"decoder.0.{kind}"] = state[f"head.{kind}"]
    reduction = "downsample.reduction.weight"
    weights[f"swin.encoder.layers.0.{reduction}"] = state[f"encoder.layers.1.{reduction}"]
    table = "relative_position_bias_table"
    for name in ("layers.0.blocks.0", "layers.0.blocks.1", "layers.1.blocks.0"):
        weights |= block(state, f"encoder.{name}", f"swin.encoder.{name}")
        theirs_table = f"swin.encoder.{name}.attention.relative_position_bias.{table}"
        weights[theirs_table] = state[f"encoder.{name}.attn.{table}"]
    theirs.load_state_dict(weights)
    assert batch.masks is not None
    side = math.isqrt(batch.masks.shape[1])
    spread = batch.masks.view(-1, side, side).repeat_interleave(4, 1).repeat_interleave(4, 2)
    assert_equal_losses(objective, batch, theirs, bool_masked_pos=spread.flatten(1))
