"""SimMIM equals its naive twins in value and gradient, never sees what it hides, refuses what it cannot train."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from data_pipeline.batch import Batch
from data_pipeline.errors import InputError
from pretrain.objectives.kinds import build_objective
from pretrain.objectives.simmim.config import SimmimConfig
from pretrain.objectives.simmim.objective import Simmim
from pretrain.recipe import recipe
from pretrain.runtime.state import Progress
from tests.objectives import cases, naive, naive_swin, papers
from tests.objectives.cases import Case, Twin

START = Progress(0, 1, 0)
VIT = recipe.Model(
    name="vit_tiny_patch16_224",
    image_size=8,
    patch_size=2,
    options={"embed_dim": 8, "depth": 2, "num_heads": 2, "global_pool": "avg", "fc_norm": False},
)
SWIN = recipe.Model(
    name="swin_tiny_patch4_window7_224",
    image_size=8,
    patch_size=1,
    options={"embed_dim": 4, "depths": (2, 2), "num_heads": (1, 2), "window_size": 4, "drop_path_rate": 0.0},
)
SWIN_V2 = SWIN.model_copy(update={"name": "swinv2_tiny_window8_256"})
CONFIG = SimmimConfig(kind="simmim", mask_patch=4)


def make(model: recipe.Model = VIT, config: SimmimConfig = CONFIG, seed: int = 0, **options: Any) -> Simmim:
    """Every weight off its start, where zeros and ones would hide a wrong formula."""
    torch.manual_seed(seed)
    objective = build_objective(model.model_copy(update={"options": {**model.options, **options}}), config)
    assert isinstance(objective, Simmim)
    with torch.no_grad():
        for p in objective.parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
    return objective


def make_batch(objective: Simmim, size: int = 2, seed: int = 1, dtype: torch.dtype = torch.float32) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    side, spec = objective.needs.image_size, objective.needs.mask
    assert spec is not None
    images = torch.randn(size, 3, side, side, generator=generator, dtype=torch.float64).to(dtype)
    masks = torch.rand(size, spec.num_patches, generator=generator).argsort(1) < spec.num_hidden
    return Batch(keys=tuple(str(i) for i in range(size)), views=(images,), masks=masks)


def pixels(masks: Tensor, block: int) -> Tensor:
    """[B, G * G] of blocks -> [B, 1, S, S], by the definition."""
    side = math.isqrt(masks.shape[1])
    rows = [
        [[m[y // block * side + x // block] for x in range(side * block)] for y in range(side * block)] for m in masks
    ]
    return torch.tensor(rows).unsqueeze(1)


@pytest.mark.parametrize("block", [2, 4])
@pytest.mark.parametrize(("class_token", "registers"), [(False, 0), (True, 0), (True, 2)])
def test_loss_and_gradients_equal_the_naive_twin(class_token: bool, registers: int, block: int) -> None:
    config = CONFIG.model_copy(update={"mask_patch": block})
    objective = make(VIT, config, class_token=class_token, reg_tokens=registers).double()
    batch = make_batch(objective, 1, dtype=torch.float64)
    weights = naive.weights_of(objective)
    shape = naive.Shape(4, 2, 2, registers=registers, class_token=class_token)

    loss = objective(batch, START).loss
    loss.backward()
    assert batch.masks is not None
    expected = naive.simmim_loss(weights, batch.views[0], batch.masks, shape, block)
    expected.backward()

    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    naive.assert_same_gradients(objective, weights)


def test_over_swin_loss_and_gradients_equal_the_naive_twin() -> None:
    """The first stage has shifted windows, the second is one window."""
    objective = make(SWIN).double()
    batch = make_batch(objective, 1, dtype=torch.float64)
    weights = naive.weights_of(objective)

    loss = objective(batch, START).loss
    loss.backward()
    assert batch.masks is not None
    shape = naive_swin.Shape(8, 1, (2, 2), (1, 2), 4)
    expected = naive_swin.simmim_loss(weights, batch.views[0], batch.masks, shape, 4)
    expected.backward()

    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    naive.assert_same_gradients(objective, weights)


@pytest.mark.parametrize("model", [VIT, SWIN, SWIN_V2], ids=["vit", "swin", "swin v2"])
@torch.no_grad()
def test_with_nothing_hidden_it_is_timm_s_own_forward(model: recipe.Model) -> None:
    objective = make(model).eval()
    images = make_batch(objective).views[0]
    found = objective.encode(images, torch.zeros(2, 2, 2, dtype=torch.bool))
    expected = objective.encoder.forward_features(images)  # type: ignore[operator]
    if model is VIT:
        expected = expected[:, 1:].view(2, 4, 4, -1)
    assert torch.equal(found, expected.permute(0, 3, 1, 2))


@given(seed=st.integers(0, 10**6), size=st.integers(1, 4), model=st.sampled_from([VIT, SWIN, SWIN_V2]))
@settings(max_examples=15, deadline=None)
def test_hidden_pixels_never_reach_the_prediction(seed: int, size: int, model: recipe.Model) -> None:
    objective = make(model).eval()
    batch = make_batch(objective, size, seed)
    assert batch.masks is not None
    images, hidden = batch.views[0], batch.masks.view(size, 2, 2)
    other = torch.where(pixels(batch.masks, 4), torch.randn(images.shape), images)
    assert not torch.equal(images, other)
    assert torch.equal(objective.predict(images, hidden), objective.predict(other, hidden))


@given(seed=st.integers(0, 10**6), size=st.integers(1, 6), ratio=st.sampled_from([0.2, 0.5, 0.6]))
@settings(max_examples=15, deadline=None)
def test_loss_of_a_batch_is_the_mean_of_its_samples_losses(seed: int, size: int, ratio: float) -> None:
    """So that micro-batches and ranks can be averaged."""
    objective = make(VIT, CONFIG.model_copy(update={"mask_ratio": ratio})).double()
    batch = make_batch(objective, size, seed, torch.float64)
    assert batch.masks is not None
    losses = [
        objective(Batch((k,), (batch.views[0][i : i + 1],), masks=batch.masks[i : i + 1]), START).loss.item()
        for i, k in enumerate(batch.keys)
    ]
    assert objective(batch, START).loss.item() == pytest.approx(math.fsum(losses) / size, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "size", "ratio", "blocks", "hidden", "stride"),
    [
        ("swin_base_patch4_window7_224", 192, 0.6, 36, 22, 32),
        ("vit_base_patch16_224", 224, 0.6, 49, 30, 16),
        ("vit_base_patch16_224", 320, 0.55, 100, 55, 16),
    ],
)
def test_hides_as_many_blocks_of_32_pixels_as_the_paper(
    name: str, size: int, ratio: float, blocks: int, hidden: int, stride: int
) -> None:
    options: dict[str, Any] = {"fc_norm": False} if name.startswith("vit") else {}
    model = recipe.Model(name=name, image_size=size, options=options)
    with torch.device("meta"):
        objective = build_objective(model, SimmimConfig(kind="simmim", mask_ratio=ratio))
    assert isinstance(objective, Simmim)
    spec = objective.needs.mask
    assert spec is not None
    assert (spec.num_patches, spec.num_hidden, objective.stride) == (blocks, hidden, stride)


@pytest.mark.parametrize("model", [VIT, SWIN], ids=["vit", "swin"])
def test_reconstruct_shows_what_is_visible_and_fills_the_hidden(model: recipe.Model) -> None:
    objective = make(model).eval()
    batch = make_batch(objective)
    images, masks = batch.views[0], batch.masks
    assert masks is not None
    at = pixels(masks, 4).expand_as(images)
    shown = objective.reconstruct(batch)
    assert torch.equal(shown.original, images)
    assert not shown.masked[at].any()
    for view in (shown.masked, shown.filled):
        assert torch.equal(view[~at], images[~at])
    error = (shown.filled - images).abs()[at].mean()
    assert objective(batch, START).loss.item() == pytest.approx(error.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("model", "config", "options", "named"),
    [
        (VIT, {"mask_patch": 3}, {}, r"objective\.mask_patch: expected a multiple of the encoder's patch size 2"),
        (VIT, {"mask_patch": 6}, {}, r"model\.image_size: expected a multiple of objective\.mask_patch 6"),
        (VIT, {"mask_patch": 8}, {}, r"objective\.mask_ratio: .*1 blocks of 8 pixels"),
        (VIT, {"mask_ratio": 0.8}, {}, r"objective\.mask_ratio: .*hides 4"),
        (VIT, {}, {"fc_norm": True}, r"model\.options: .*SimMIM.*fc_norm\.weight"),
        (VIT, {}, {"patch_drop_rate": 0.5}, r"model\.options\.patch_drop_rate"),
        (SWIN, {}, {"depths": (1,) * 5, "num_heads": (1,) * 5}, r"model\.image_size: .*the encoder's stride 16"),
    ],
)
def test_refuses_what_it_cannot_train(
    model: recipe.Model, config: dict[str, Any], options: dict[str, Any], named: str
) -> None:
    with pytest.raises(InputError, match=named):
        make(model, CONFIG.model_copy(update=config), **options)


def test_refuses_an_encoder_without_patches() -> None:
    with pytest.raises(InputError, match=r"model\.name: expected a plain timm ViT.*SimMIM.*ResNet"):
        build_objective(recipe.Model(name="resnet18", image_size=32), CONFIG)


SIMMIM = SimmimConfig(kind="simmim", mask_patch=8)
CASES = {
    "simmim": Case(cases.TINY_VIT, SIMMIM),
    "simmim, class token and registers": Case(cases.CLASS_TOKEN_VIT, SIMMIM),
    "simmim, swin": Case(cases.TINY_SWIN, SIMMIM),
    "simmim, swin v2": Case(cases.TINY_SWIN_V2, SIMMIM),
}


def naive_loss(objective: Simmim, weights: naive.Weights, batch: Batch) -> Tensor:
    assert batch.masks is not None
    shape = naive.Shape(4, 4, 2, class_token=False)
    return naive.simmim_loss(weights, batch.views[0], batch.masks, shape, block=8)


TWIN = Twin(
    Case(cases.TINY_VIT.model_copy(update={"options": {**cases.TINY_VIT.options, "embed_dim": 8, "depth": 1}}), SIMMIM),
    naive_loss,
    batch_size=1,
)


PUBLISHED: dict[str, papers.Numbers] = {}

# Xie et al. 2021 (2111.09886), section 4.1 and the authors' configurations of 800 epochs.
PUBLISHED["simmim_vit_b16"] = {
    "batch": 2048,
    "schedule": {"kind": "step", "epochs": 800, "warmup": 10, "milestones": (700,), "gamma": 0.1},
    "optim": {
        "kind": "adamw", "peak_lr": 1e-4 * 2048 / 512, "lr_batch": 512, "betas": (0.9, 0.999), "weight_decay": 0.05,
        "clip_norm": 5.0,
    },
    "views": {"scale": (0.67, 1.0), "interpolation": "bilinear", "eval_crop": 0.875},
    "model": {
        "name": "vit_base_patch16_224", "image_size": 224,
        "options": {"global_pool": "avg", "init_values": 0.1, "drop_path_rate": 0.1},
    },
    "objective": {"kind": "simmim", "mask_ratio": 0.6, "mask_patch": 32},
}  # fmt: skip
PUBLISHED["simmim_swin_b"] = {
    **PUBLISHED["simmim_vit_b16"],
    "model": {"name": "swin_base_patch4_window7_224", "image_size": 192, "options": {"window_size": 6}},
}


def test_a_vit_starts_as_in_the_authors_code() -> None:
    """A normal that is cut at one deviation has 0.54 of it; what a block adds is smaller the deeper it is."""
    model = cases.TINY_VIT.model_copy(update={"options": {"embed_dim": 192, "depth": 4, "num_heads": 2}})
    torch.manual_seed(0)
    objective = build_objective(model, SimmimConfig(kind="simmim", mask_patch=8))
    weights = {name: p.detach() for name, p in objective.named_parameters()}
    narrow = 0.5396 * 0.02
    for name in ("encoder.patch_embed.proj", "encoder.blocks.3.attn.qkv", "encoder.blocks.0.mlp.fc1"):
        assert float(weights[f"{name}.weight"].std()) == pytest.approx(narrow, rel=0.05), name
        assert float(weights[f"{name}.weight"].abs().max()) <= 0.02
        assert not weights[f"{name}.bias"].any()
    for name in ("encoder.pos_embed", "encoder.cls_token", "mask_token"):
        assert 0.5 * narrow < float(weights[name].std()) < 1.5 * narrow, name
        assert float(weights[name].abs().max()) <= 0.02
    for block in range(4):
        for last in ("attn.proj", "mlp.fc2"):
            found = float(weights[f"encoder.blocks.{block}.{last}.weight"].std())
            assert found == pytest.approx(narrow / math.sqrt(2 * (block + 1)), rel=0.05), (block, last)
