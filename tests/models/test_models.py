"""Encoders are timm's: built, saved and loaded so that timm reads them, and never loaded in part."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from data_pipeline.errors import CheckpointError, InputError
from data_pipeline.samples.preprocessing import Preprocessing
from pretrain.engine.attention import choose_attention
from pretrain.models.encoder_folders import save_encoder
from pretrain.models.encoders import build_encoder, model_args
from pretrain.models.load_encoder import load_encoder
from pretrain.models.strict_loading import load_strictly
from pretrain.recipe.recipe import Model

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
AVERAGED = {"class_token": False, "global_pool": "avg", "fc_norm": False}
VIT = Model(
    name="vit_tiny_patch16_224",
    image_size=24,
    patch_size=4,
    options={"embed_dim": 16, "depth": 2, "num_heads": 2, **AVERAGED},
)
SWIN = Model(
    name="swin_tiny_patch4_window7_224",
    image_size=24,
    patch_size=2,
    options={"embed_dim": 8, "depths": (2, 2, 1), "num_heads": (1, 2, 4), "window_size": 3},
)
MODELS = {
    "vit": VIT,
    "vit, class token": Model(name="vit_tiny_patch16_224", image_size=32, options={"embed_dim": 16, "num_heads": 2}),
    "deit, distilled": Model(name="deit_tiny_distilled_patch16_224", image_size=32, options={"depth": 1}),
    "vit, dynamic by default": Model(name="test_vit", image_size=32, patch_size=8),
    "swin": SWIN,
    "swin, v2": SWIN.model_copy(update={"name": "swinv2_tiny_window8_256"}),
    "resnet, 3x3 stem": Model(name="resnet18_cifar", image_size=32),
    "resnet": Model(name="test_resnet", image_size=40, options={"stem_type": "deep", "output_stride": 8}),
}
every_model = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())


def built(model: Model, seed: int = 0) -> nn.Module:
    """With every weight and statistic off its start."""
    torch.manual_seed(seed)
    encoder = build_encoder(model).eval()
    with torch.no_grad():
        for tensor in encoder.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor), alpha=0.1)
    return encoder


def images(model: Model) -> Tensor:
    return torch.randn(2, 3, model.image_size, model.image_size, generator=torch.Generator().manual_seed(0))


def pixels(model: Model) -> Preprocessing:
    return Preprocessing(model.judged_size, MEAN, STD, "bilinear", 0.9)


def saved(folder: Path, model: Model = VIT, seed: int = 0) -> nn.Module:
    encoder = built(model, seed)
    save_encoder(folder, encoder.state_dict(), model, pixels(model))
    return encoder


@every_model
def test_features_are_rows_of_the_named_width(model: Model) -> None:
    encoder = built(model)
    assert encoder(images(model)).shape == (2, encoder.head_hidden_size)
    assert not getattr(encoder, "dynamic_img_size", False)  # MAE counts on a fixed grid of patches


@every_model
@torch.no_grad()
def test_saved_encoder_gives_equal_features_wherever_it_is_loaded(model: Model, tmp_path: Path) -> None:
    expected = saved(tmp_path, model)(images(model))
    weights = load_file(tmp_path / "model.safetensors")

    ours, _ = load_encoder(tmp_path)
    by_folder = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    by_name = timm.create_model(model.name, **model_args(model))
    by_name.load_state_dict(weights, strict=True)
    for encoder in (ours, by_folder, by_name):
        assert torch.equal(encoder.eval()(images(model)), expected)

    classifier = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=7).eval()
    assert classifier(images(model)).shape == (2, 7)
    assert all(torch.equal(classifier.state_dict()[name], value) for name, value in weights.items())


def test_config_says_how_images_are_prepared(tmp_path: Path) -> None:
    saved(tmp_path)
    _, config = load_encoder(tmp_path)
    assert config.name == "vit_tiny_patch16_224"
    assert config.preprocessing == Preprocessing(24, MEAN, STD, "bilinear", 0.9)
    by_timm = timm.data.resolve_data_config(model=timm.create_model(f"local-dir:{tmp_path}"))
    assert by_timm["input_size"] == (3, 24, 24)
    assert (tuple(by_timm["mean"]), tuple(by_timm["std"]), by_timm["crop_pct"]) == (MEAN, STD, 0.9)
    assert by_timm["interpolation"] == "bilinear"


def test_saving_again_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    saved(tmp_path, seed=1)
    second = saved(tmp_path, seed=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert torch.equal(load_encoder(tmp_path)[0].eval()(images(VIT)), second(images(VIT)))


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_files_have_the_mode_that_the_umask_says(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        saved(tmp_path, seed=1)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o666 & ~umask}


def test_a_save_cut_off_between_its_files_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "old", seed=1)
    saved(tmp_path / "new", seed=2)
    (tmp_path / "new" / "model.safetensors").replace(tmp_path / "old" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: expected sha256"):
        load_encoder(tmp_path / "old")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load_encoder(tmp_path / "new")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_encoder(tmp_path / "neither")


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"architecture": "no_such_model", "num_classes": 0}', '{"pretrained_cfg": 3}', "[" * 10**5],
)
def test_a_damaged_config_is_one_error(text: str, tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match="expected an encoder"):
        load_encoder(tmp_path)


def test_damaged_weights_are_one_error(tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no tensors at all")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: expected safetensors.*again"):
        load_encoder(tmp_path)


def damage(state: dict[str, Tensor], how: str) -> dict[str, Tensor]:
    name = "blocks.1.mlp.fc1.weight"
    match how:
        case "missing":
            del state[name]
        case "unexpected":
            state["blocks.1.mlp.fc3.weight"] = state[name].clone()
        case "of another shape":
            state[name] = state[name].T.contiguous()
        case "not finite":
            state[name].view(-1)[5] = float("nan")
    return state


@pytest.mark.parametrize("how", ["missing", "unexpected", "of another shape", "not finite"])
def test_weights_that_do_not_fit_are_refused_by_name_and_change_nothing(how: str, tmp_path: Path) -> None:
    saved(tmp_path)
    file, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    state = damage(load_file(file), how)
    save_file(state, file)
    text = json.loads(config.read_text())
    del text["file_sha256"]  # as in a folder that timm wrote
    config.write_text(json.dumps(text))
    with pytest.raises(CheckpointError, match=rf"found 1 {how}: blocks\.1\.mlp\.fc"):
        load_encoder(tmp_path)

    encoder = built(VIT, seed=5)
    before = encoder.state_dict()["blocks.0.norm1.weight"].clone()
    with pytest.raises(CheckpointError, match=how):
        load_strictly(encoder, state, where="weights")
    assert torch.equal(encoder.state_dict()["blocks.0.norm1.weight"], before)


@pytest.mark.parametrize(
    ("changes", "field", "told"),
    [
        ({"name": "vit_tinny_patch16_224"}, "model.name", "vit_tiny_patch16_224"),
        ({"name": "vit_base_patch16_224.augreg_in21k"}, "model.name", "vit_base_patch16_224"),
        ({"name": "convnext_tiny"}, "model.name", "a timm ViT, Swin or ResNet"),
        ({"options": {"embed_dims": 16}}, "model.options.embed_dims", "embed_dim"),
        ({"options": {"img_size": 16}}, "model.options.img_size", "none of that name"),
        ({"options": {"num_classes": 5}}, "model.options.num_classes", "none of that name"),
        ({"options": {"pretrained": True}}, "model.options.pretrained", "none of that name"),
        ({"options": {"global_pool": ""}}, "model.options.global_pool", "pooling"),
        ({"options": {"embed_dim": 16, "num_heads": 3}}, "model.options", "num_heads"),
        ({"options": {"depth": "many"}}, "model.options", "depth"),
        (
            {"name": "swin_tiny_patch4_window7_224", "options": {"windowsize": 3}},
            "model.options.windowsize",
            "window_size",
        ),
        ({"name": SWIN.name, "options": {"depths": 3}}, "model.options", "timm can build"),
        ({"image_size": 26}, "model.image_size", "multiple of the patch size 4"),
        ({"image_size": 3}, "model.image_size", "multiple of the patch size 4"),
        ({"name": "resnet18", "options": {}}, "model.patch_size", "Remove it"),
        ({"name": "resnet18_cifar", "patch_size": None, "options": {"stem_type": "deep"}}, "model.options", "stem"),
    ],
)
def test_what_timm_cannot_build_is_an_input_error(changes: dict[str, Any], field: str, told: str) -> None:
    with pytest.raises(InputError) as caught:
        build_encoder(VIT.model_copy(update=changes))
    assert caught.value.where == field
    assert told in str(caught.value)


@torch.no_grad()
def test_the_resnet_for_small_images_is_timm_s_but_for_its_stem() -> None:
    """Same names, shapes and start but those of the first convolution, and 4 x 4 features where timm's has 1 x 1."""
    torch.manual_seed(0)
    ours = build_encoder(Model(name="resnet18_cifar", image_size=32)).eval()
    theirs = timm.create_model("resnet18", num_classes=0).eval()
    shapes = {name: value.shape for name, value in theirs.state_dict().items()}
    assert {name: value.shape for name, value in ours.state_dict().items()} == {**shapes, "conv1.weight": (64, 3, 3, 3)}
    pictures = images(Model(name="resnet18_cifar", image_size=32))
    assert ours.forward_features(pictures).shape == (2, 512, 4, 4)
    assert ours.conv1.stride == (1, 1)
    theirs.load_state_dict({**ours.state_dict(), "conv1.weight": theirs.conv1.weight})
    theirs.conv1, theirs.maxpool = ours.conv1, nn.Identity()
    assert torch.equal(theirs(pictures), ours(pictures))


def test_nothing_is_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[object] = []

    def refuse(_: object, address: object, *__: object) -> None:
        opened.append(address)  # counted, as a library that asks may live with a refusal
        raise ConnectionRefusedError

    monkeypatch.setattr("socket.socket.connect", refuse)
    encoder = build_encoder(Model(name="vit_tiny_patch16_224", image_size=32, options={"depth": 1}))
    assert len(encoder.blocks) == 1
    assert opened == []


@torch.no_grad()
def test_both_attentions_compute_the_same() -> None:
    encoder = built(VIT)
    features = {}
    for precision in ("fp32", "bf16"):
        choose_attention(encoder, torch.device("cpu"), precision)  # type: ignore[arg-type]
        features[precision] = encoder(images(VIT))
    assert not encoder.blocks[0].attn.fused_attn
    torch.testing.assert_close(features["bf16"], features["fp32"], rtol=1e-5, atol=1e-5)
    choose_attention(encoder, torch.device("cuda"), "bf16")
    assert encoder.blocks[0].attn.fused_attn


@pytest.mark.parametrize(("sdpa", "fused"), [("on", True), ("off", False)])
def test_a_recipe_may_choose_the_attention(sdpa: Any, fused: bool) -> None:
    encoder = built(VIT)
    for precision in ("fp32", "bf16"):
        choose_attention(encoder, torch.device("cpu"), precision, sdpa)  # type: ignore[arg-type]
        assert {block.attn.fused_attn for block in encoder.blocks} == {fused}


def test_a_resnet_is_judged_at_a_size_of_its_own_and_a_vit_is_not(tmp_path: Path) -> None:
    model = Model(name="test_resnet", image_size=32, eval_size=48)
    saved(tmp_path, model)
    assert load_encoder(tmp_path)[1].preprocessing.image_size == 48
    with pytest.raises(InputError, match=r"model\.eval_size.*image_size 24 alone"):
        build_encoder(VIT.model_copy(update={"eval_size": 48}))
