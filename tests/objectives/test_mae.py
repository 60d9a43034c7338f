"""MAE equals its naive twin in value and gradient, never sees what it hides, refuses what it cannot train."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from data_pipeline.batch import Batch
from data_pipeline.errors import InputError
from pretrain.objectives.kinds import build_objective
from pretrain.objectives.mae.config import MaeConfig
from pretrain.objectives.mae.objective import Mae, patchify, unpatchify
from pretrain.recipe import recipe
from pretrain.runtime.state import Progress
from tests.objectives import cases, naive, papers
from tests.objectives.cases import Case, Twin

START = Progress(0, 1, 0)
OPTIONS = {"embed_dim": 8, "depth": 2, "num_heads": 2, "global_pool": "avg", "fc_norm": False}
CONFIG = MaeConfig(kind="mae", mask_ratio=0.6, decoder_width=12, decoder_depth=1, decoder_heads=3)


def make(config: MaeConfig = CONFIG, image_size: int = 6, seed: int = 0, **options: Any) -> Mae:
    torch.manual_seed(seed)
    model = recipe.Model(
        name="vit_tiny_patch16_224", image_size=image_size, patch_size=2, options={**OPTIONS, **options}
    )
    objective = build_objective(model, config)
    assert isinstance(objective, Mae)
    return objective


def make_batch(objective: Mae, size: int = 2, seed: int = 1, dtype: torch.dtype = torch.float32) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    side, spec = objective.needs.image_size, objective.needs.mask
    assert spec is not None
    images = torch.randn(size, 3, side, side, generator=generator, dtype=torch.float64).to(dtype)
    masks = torch.rand(size, spec.num_patches, generator=generator).argsort(1) < spec.num_hidden
    return Batch(keys=tuple(str(i) for i in range(size)), views=(images,), masks=masks)


@torch.no_grad()
def shake(objective: Mae) -> Mae:
    """Moves every weight off its start, where zeros and ones would hide a wrong formula."""
    for p in objective.parameters():
        p.add_(torch.randn_like(p), alpha=0.2)
    return objective


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    ("class_token", "registers", "no_embed_class"),
    [(False, 0, False), (True, 0, False), (True, 2, False), (True, 1, True)],
)
def test_loss_and_gradients_equal_the_naive_twin(
    class_token: bool, registers: int, no_embed_class: bool, normalize: bool
) -> None:
    config = CONFIG.model_copy(update={"normalize_target": normalize})
    objective = make(config, class_token=class_token, reg_tokens=registers, no_embed_class=no_embed_class)
    objective = shake(objective.double())
    batch = make_batch(objective, dtype=torch.float64)
    shape = naive.Shape(3, 2, 2, 3, registers, class_token, no_embed_class)
    weights = naive.weights_of(objective)

    loss = objective(batch, START).loss
    loss.backward()
    assert batch.masks is not None
    expected = naive.mae_loss(weights, objective.decoder.pos_embed, batch.views[0], batch.masks, shape, normalize)
    expected.backward()

    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    naive.assert_same_gradients(objective, weights)


def test_all_patches_visible_is_timm_s_own_forward() -> None:
    objective = shake(make(class_token=True, reg_tokens=1, pre_norm=True))
    images = make_batch(objective).views[0]
    everything = torch.arange(9).expand(2, 9)
    assert torch.equal(objective.encode(images, everything), objective.encoder.forward_features(images))


@given(seed=st.integers(0, 10**6), size=st.integers(1, 5))
@settings(max_examples=20, deadline=None)
def test_hidden_pixels_never_reach_the_encoder(seed: int, size: int) -> None:
    objective = make(class_token=True)
    batch = make_batch(objective, size, seed)
    images, masks = batch.views[0], batch.masks
    assert masks is not None
    visible = torch.stack([(~mask).nonzero()[:, 0] for mask in masks])
    other = patchify(images, 2)
    other[masks] = torch.randn(int(masks.sum()), 12)
    assert torch.equal(objective.encode(images, visible), objective.encode(unpatchify(other, 2), visible))


@given(seed=st.integers(0, 10**6), size=st.integers(1, 6), ratio=st.sampled_from([0.2, 0.5, 0.75, 0.9]))
@settings(max_examples=15, deadline=None)
def test_loss_of_a_batch_is_the_mean_of_its_samples_losses(seed: int, size: int, ratio: float) -> None:
    """So that micro-batches and ranks can be averaged."""
    objective = make(CONFIG.model_copy(update={"mask_ratio": ratio})).double()
    batch = make_batch(objective, size, seed, torch.float64)
    assert batch.masks is not None
    losses = [
        objective(Batch((k,), (batch.views[0][i : i + 1],), masks=batch.masks[i : i + 1]), START).loss.item()
        for i, k in enumerate(batch.keys)
    ]
    assert objective(batch, START).loss.item() == pytest.approx(math.fsum(losses) / size, rel=1e-12)


@pytest.mark.parametrize(("ratio", "hidden"), [(0.75, 48), (0.6, 38), (0.9, 58), (0.01, 1)])
def test_hides_the_rounded_share_of_the_patches(ratio: float, hidden: int) -> None:
    spec = make(CONFIG.model_copy(update={"mask_ratio": ratio}), image_size=16).needs.mask
    assert spec is not None
    assert (spec.num_patches, spec.num_hidden) == (64, hidden)


@given(side=st.integers(1, 5), patch=st.integers(1, 4))
@settings(max_examples=20, deadline=None)
def test_patchify_lays_out_the_grid_row_by_row_and_is_undone(side: int, patch: int) -> None:
    images = torch.randn(2, 3, side * patch, side * patch)
    patches = patchify(images, patch)
    shape = naive.Shape(side, patch, 1)
    for n in range(side * side):
        assert patches[0, n].tolist() == [float(v) for v in naive.patch_values(images[0], n, shape)]
    assert torch.equal(unpatchify(patches, patch), images)


def test_positions_are_the_paper_s_sine_and_cosine() -> None:
    """Equal to the authors' up to the order of the channels, which no later layer can tell."""
    objective = make(image_size=10, class_token=True, embed_dim=16, num_heads=2)
    assert torch.equal(objective.encoder.pos_embed[0, 0], torch.zeros(16))
    for positions in (objective.encoder.pos_embed[0, 1:], objective.decoder.pos_embed):
        quarter = positions.shape[1] // 4
        for n, position in enumerate(positions):
            expected = [
                wave(at / 10_000 ** (i / quarter))
                for at in divmod(n, 5)
                for wave in (math.sin, math.cos)
                for i in range(quarter)
            ]
            assert sorted(position.tolist()) == pytest.approx(sorted(expected), abs=1e-6)
    assert len(torch.unique(objective.decoder.pos_embed, dim=0)) == 25


def test_starts_from_the_seed_with_weights_scaled_by_xavier() -> None:
    first, second, other = make(seed=3), make(seed=3), make(seed=4)
    weights = dict(first.named_parameters())
    assert all(torch.equal(p, weights[name]) for name, p in second.named_parameters())
    assert any(not torch.equal(p, weights[name]) for name, p in other.named_parameters())
    for name, (fan_in, fan_out) in {
        "encoder.blocks.0.attn.qkv.weight": (8, 24),
        "encoder.patch_embed.proj.weight": (12, 8),
        "decoder.head.weight": (12, 12),
    }.items():
        bound = math.sqrt(6 / (fan_in + fan_out))
        assert 0.8 * bound < weights[name].abs().max() <= bound
    assert 0.002 < weights["decoder.mask_token"].std() < 0.2


@pytest.mark.parametrize("normalize", [True, False])
def test_reconstruct_shows_visible_patches_and_fills_the_hidden(normalize: bool) -> None:
    objective = make(CONFIG.model_copy(update={"normalize_target": normalize}))
    batch = make_batch(objective)
    images, masks = batch.views[0], batch.masks
    assert masks is not None

    shown = objective.reconstruct(batch)
    assert torch.equal(shown.original, images)
    assert torch.equal(patchify(shown.masked, 2)[masks], torch.zeros(int(masks.sum()), 12))
    for view in (shown.masked, shown.filled):
        assert torch.equal(patchify(view, 2)[~masks], patchify(images, 2)[~masks])

    hidden = patchify(images, 2)[masks].view(2, -1, 12)
    mean, std = hidden.mean(-1, keepdim=True), (hidden.var(-1, keepdim=True) + 1e-6).sqrt()
    truth = (hidden - mean) / std if normalize else hidden
    objective.decoder.forward = lambda *_: truth  # type: ignore[method-assign]
    assert objective(batch, START).loss.item() == pytest.approx(0, abs=1e-10)
    torch.testing.assert_close(objective.reconstruct(batch).filled, images)


@pytest.mark.parametrize(
    ("changes", "config", "named"),
    [
        ({"global_pool": "avg", "fc_norm": True}, {}, "fc_norm.weight"),
        ({"global_pool": "map"}, {}, "attn_pool"),
        ({"patch_drop_rate": 0.5}, {}, "model.options.patch_drop_rate"),
        ({"embed_dim": 10}, {}, "model.options.embed_dim"),
        ({}, {"mask_ratio": 0.01}, "objective.mask_ratio"),
        ({}, {"mask_ratio": 0.99}, "objective.mask_ratio"),
        ({}, {"decoder_width": 9, "decoder_heads": 3}, "objective.decoder_width"),
    ],
)
def test_refuses_what_it_cannot_train(changes: dict[str, Any], config: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        make(CONFIG.model_copy(update=config), **changes)


def test_heads_that_do_not_divide_the_decoder_are_refused_in_the_recipe() -> None:
    with pytest.raises(ValidationError, match=r"decoder_width that decoder_heads 5 divides, found 12\."):
        MaeConfig(kind="mae", decoder_width=12, decoder_heads=5)


def test_refuses_an_encoder_without_patches() -> None:
    with pytest.raises(InputError, match=r"model\.name: expected a plain timm ViT.*ResNet"):
        build_objective(recipe.Model(name="resnet18", image_size=32), CONFIG)


def test_refuses_masks_that_are_not_the_ones_it_asked_for() -> None:
    objective = make()
    batch = make_batch(objective)
    for masks, error in (
        (None, ValueError),
        (torch.zeros(2, 4, dtype=torch.bool), ValueError),
        (torch.zeros(2, 9, dtype=torch.bool), RuntimeError),
    ):
        with pytest.raises(error, match=r"mask|hide"):
            objective(Batch(batch.keys, batch.views, masks=masks), START)


MAE = MaeConfig(kind="mae", decoder_width=16, decoder_depth=1, decoder_heads=2)
CASES = {
    "mae": Case(cases.TINY_VIT, MAE),
    "mae, class token and registers": Case(cases.CLASS_TOKEN_VIT, MAE),
}


def naive_loss(objective: Mae, weights: naive.Weights, batch: Batch) -> torch.Tensor:
    assert batch.masks is not None
    shape = naive.Shape(2, 3, 2, 2, class_token=False)
    return naive.mae_loss(weights, objective.decoder.pos_embed, batch.views[0], batch.masks, shape, normalize=True)


TWIN = Twin(Case(cases.TWIN_VIT, MAE), naive_loss)


PUBLISHED: dict[str, papers.Numbers] = {}

# He et al. 2021 (2111.06377), table 8.
PUBLISHED["mae_vit_b16"] = {
    "batch": 4096,
    "schedule": {"kind": "cosine", "epochs": 800, "warmup": 40},
    "optim": {
        "kind": "adamw", "peak_lr": 1.5e-4 * 4096 / 256, "lr_batch": 256, "betas": (0.9, 0.95), "weight_decay": 0.05,
    },
    "views": {"scale": (0.2, 1.0), "interpolation": "bicubic", "eval_crop": 0.875},
    "model": {"name": "vit_base_patch16_224", "image_size": 224},
    "objective": {
        "kind": "mae", "mask_ratio": 0.75, "decoder_width": 512, "decoder_depth": 8, "decoder_heads": 16,
        "normalize_target": True,
    },
}  # fmt: skip
PUBLISHED["mae_vit_l16"] = {
    **PUBLISHED["mae_vit_b16"],
    "model": {"name": "vit_large_patch16_224", "image_size": 224},
}


@pytest.mark.parametrize("side", [2, 3, 5, 6, 7])
def test_at_three_quarters_as_many_are_hidden_as_by_the_authors_of_a_square_image(side: int) -> None:
    model = cases.TINY_VIT.model_copy(update={"image_size": 4 * side})
    objective = build_objective(model, MaeConfig(kind="mae", decoder_width=8, decoder_depth=1, decoder_heads=2))
    assert objective.needs.mask is not None
    assert objective.needs.mask.num_hidden == side**2 - int(side**2 * (1 - 0.75))
