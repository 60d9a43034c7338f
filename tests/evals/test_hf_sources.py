"""Folders of transformers: images are prepared as it prepares them, and what cannot be done here is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from data_pipeline.errors import CheckpointError, InputError
from data_pipeline.samples.views import evaluation_view
from launch.commands.eval import app
from pretrain.evals.result import EvalReport
from pretrain.evals.sources.load import load_source
from pretrain.evals.sources.timm_names import Architecture
from pretrain.evals.sources.towers import load_towers
from pretrain.models.hf_folders import is_hf_folder, read_preprocessing
from tests.evals.conftest import Folders

os.environ["HF_HUB_OFFLINE"] = "1"
import transformers

TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
HALF = [0.5] * 3
PIXELS = {"image_size": 16, "patch_size": 8}
Null = object()
VIT, CLIP = transformers.ViTImageProcessor, transformers.CLIPImageProcessor


def save_vit(folder: Path, **changed: Any) -> Path:
    transformers.ViTModel(transformers.ViTConfig(**TINY, **PIXELS, **changed)).save_pretrained(folder)
    VIT(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def save_clip_image(folder: Path) -> Path:
    transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**TINY, **PIXELS)).save_pretrained(folder)
    CLIP(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def save_clip(folder: Path) -> Path:
    config = transformers.CLIPConfig(
        projection_dim=8, vision_config={**TINY, **PIXELS}, text_config={**TINY, "max_position_embeddings": 8}
    )
    transformers.CLIPModel(config).save_pretrained(folder)
    CLIP(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def change(path: Path, **entries: Any) -> None:
    """Entries of a JSON file; None takes one out, and Null is its null."""
    told = {**json.loads(path.read_text()), **entries}
    kept = {key: value for key, value in told.items() if value is not None}
    path.write_text(json.dumps(kept, default=lambda null: None))


@pytest.mark.parametrize(
    "processor",
    [
        VIT(size={"height": 24, "width": 24}),
        VIT(size={"height": 24, "width": 24}, resample=3, do_center_crop=True, crop_size={"height": 16, "width": 16}),
        CLIP(size={"shortest_edge": 21}, crop_size={"height": 16, "width": 16}),
        transformers.DeiTImageProcessor(size={"height": 24, "width": 24}, crop_size={"height": 16, "width": 16}),
    ],
)
@pytest.mark.parametrize("shape", [(40, 61), (33, 20), (16, 16)])
def test_images_are_prepared_as_transformers_does(tmp_path: Path, processor: Any, shape: tuple[int, int]) -> None:
    processor.save_pretrained(tmp_path)
    found = read_preprocessing(tmp_path)
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    view = evaluation_view(image, found) / 255
    ours = (view - torch.tensor(found.mean)[:, None, None]) / torch.tensor(found.std)[:, None, None]
    theirs = processor(images=image, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_old_and_joint_files_of_processors_are_read(tmp_path: Path) -> None:
    kept = {"resample": 3, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps({"feature_extractor_type": "CLIPFeatureExtractor", "size": 20, "crop_size": 16, **kept}))
    clip = read_preprocessing(tmp_path)
    assert (clip.image_size, clip.eval_resize, clip.eval_crop) == (16, "shorter", 16 / 20)
    path.write_text(json.dumps({"feature_extractor_type": "ViTFeatureExtractor", "size": 20, **kept}))
    vit = read_preprocessing(tmp_path)
    assert (vit.image_size, vit.eval_resize, vit.eval_crop) == (20, "square", 1)
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": json.loads(path.read_text())}))
    path.unlink()
    assert read_preprocessing(tmp_path) == vit
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": None}))
    with pytest.raises(CheckpointError, match=r"processor_config\.json: size"):
        read_preprocessing(tmp_path)


@pytest.mark.parametrize(
    ("kind", "entries"),
    [
        ("DeiT", {"size": 24, "crop_size": 16, "do_center_crop": True, "resample": 3}),
        ("DeiT", {"size": 24, "crop_size": 16}),
        ("ViT", {"size": 24}),
        ("CLIP", {"size": 24, "crop_size": 16}),
    ],
)
def test_an_old_file_is_followed_as_its_processor_does(tmp_path: Path, kind: str, entries: dict[str, Any]) -> None:
    """A file of the class's former name, which leaves out what was its default."""
    told = {"feature_extractor_type": f"{kind}FeatureExtractor", **entries, "image_mean": HALF, "image_std": HALF}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(told))
    found = read_preprocessing(tmp_path)
    image = np.random.default_rng(0).integers(0, 256, (40, 61, 3), dtype=np.uint8)
    ours = (evaluation_view(image, found) / 255 - 0.5) / 0.5
    processor = getattr(transformers, f"{kind}ImageProcessor").from_pretrained(tmp_path)
    theirs = processor(images=image, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("entries", "told"),
    [
        (
            {"resample": None, "image_processor_type": "BeitImageProcessor"},
            r'resample.*found none\. Edit "resample" in',
        ),
        ({"size": 256, "crop_size": None, "image_processor_type": "DeiTImageProcessor"}, "crop_size: expected a value"),
        ({"resample": 1}, "resample.*bicubic.*found 1"),
        ({"size": {"height": 16, "width": 24}}, "size: expected equal"),
        ({"size": {"longest_edge": 16}}, "size: expected equal"),
        ({"size": {"shortest_edge": 16}}, "do_center_crop"),
        ({"size": 16, "image_processor_type": "BitImageProcessor"}, "shortest_edge.*Bit"),
        ({"do_center_crop": True, "crop_size": {"height": 20, "width": 20}}, "crop_size.*at most the resized 16"),
        ({"do_normalize": False}, "do_normalize"),
        ({"do_pad": True}, "do_pad"),
        ({"rescale_factor": 1.0}, "rescale_factor"),
        ({"image_mean": [0.5]}, "image_mean.*three"),
        ({"image_std": None}, "image_std.*none"),
        ({"size": {"height": 32, "width": 32}}, "16 x 16.*found 32.*--image-size"),
        ({"do_center_crop": True}, "crop_size: expected a value, found none"),
        ({"rescale_factor": Null}, "rescale_factor: expected a value, found none"),
        ({"rescale_factor": "1/255"}, "an image processor's entries, found TypeError"),
        ({"resample": [3]}, r"resample.*found \[3\]"),
        ({"size": {"shortest_edge": Null}}, "size: expected a number of pixels, found None"),
        ({"size": {"shortest_edge": 0}, "crop_size": 0}, "size: expected a number of pixels, found 0"),
        ({"size": 16, "crop_size": 0}, "crop_size: expected a number of pixels, found 0"),
    ],
)
def test_a_preprocessing_that_cannot_be_done_is_refused(tmp_path: Path, entries: dict[str, Any], told: str) -> None:
    change(save_vit(tmp_path) / "preprocessor_config.json", **entries)
    with pytest.raises(CheckpointError, match=told):
        load_source(str(tmp_path))


@pytest.mark.parametrize(
    ("entries", "told"),
    [
        ({"model_type": "dinov2"}, "vit_mae or clip.*found dinov2"),
        ({"hidden_act": "silu"}, "hidden_act"),
        ({"num_channels": 1}, "RGB"),
        ({"image_size": [16, 24]}, "square image_size"),
        ({"num_attention_heads": 3}, "built from"),
        ({"num_hidden_layers": 2}, r"16 missing: encoder\.layer\.1\.attention\.attention\.key\.bias"),
        ({"qkv_bias": False}, "3 unexpected: .*key.bias"),
        ({"hidden_act": ["gelu"]}, r"hidden_act, .*found \['gelu'\]"),
        ({"patch_size": [8, 16]}, r"^\S+json: expected a square patch_size, found \[8, 16\]"),
        ({"hidden_size": 0}, "built from, found ZeroDivisionError"),
        ({"hidden_size": Null}, "built from, found TypeError"),
    ],
)
def test_a_configuration_that_cannot_be_followed_is_refused(tmp_path: Path, entries: dict[str, Any], told: str) -> None:
    change(save_vit(tmp_path) / "config.json", **entries)
    with pytest.raises(CheckpointError, match=told):
        load_source(str(tmp_path))


@pytest.mark.parametrize(
    ("entries", "told"),
    [
        ({"num_attention_heads": 0}, "built from, found ZeroDivisionError"),
        ({"hidden_act": ["gelu"]}, r"hidden_act, .*found \['gelu'\]"),
        ({"projection_dim": Null}, "built from, found TypeError"),
    ],
)
def test_likewise_of_an_image_tower_alone(tmp_path: Path, entries: dict[str, Any], told: str) -> None:
    change(save_clip_image(tmp_path) / "config.json", **entries)
    with pytest.raises(CheckpointError, match=rf"config\.json: expected .*{told}"):
        load_source(str(tmp_path))


@pytest.mark.parametrize(
    ("entries", "told"),
    [
        ({"vision_config": [1]}, "built from, found TypeError"),
        ({"text_config": {"num_attention_heads": 0}}, "build both towers, found ValueError"),
    ],
)
def test_likewise_of_two_towers(tmp_path: Path, entries: dict[str, Any], told: str) -> None:
    change(save_clip(tmp_path) / "config.json", **entries)
    with pytest.raises(InputError, match=rf"config\.json: expected .*{told}"):
        load_source(str(tmp_path))


@pytest.mark.parametrize("architectures", [Null, [], 5])
def test_a_configuration_need_not_name_its_classes(tmp_path: Path, architectures: object) -> None:
    change(save_clip_image(tmp_path) / "config.json", architectures=architectures)
    assert load_source(str(tmp_path)).description["architecture"] == "clip_vision_model"


def test_a_hidden_width_that_is_no_multiple_is_kept(tmp_path: Path) -> None:
    """22 * (30 / 22) is less than 30 in floating point."""
    odd = {**TINY, "hidden_size": 22, "intermediate_size": 30}
    for name, model, config in (
        ("vit", transformers.ViTModel, transformers.ViTConfig(**odd, **PIXELS)),
        ("tower", transformers.CLIPVisionModel, transformers.CLIPVisionConfig(**odd, **PIXELS)),
        ("clip", transformers.CLIPModel, transformers.CLIPConfig(vision_config={**odd, **PIXELS}, text_config=odd)),
    ):
        model(config).save_pretrained(tmp_path / name)
        CLIP(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(tmp_path / name)
        module = load_source(str(tmp_path / name)).module
        widths = {
            tuple(weight.shape) for key, weight in module.state_dict().items() if ".mlp." in key and weight.ndim == 2
        }
        assert widths == {(30, 22), (22, 30)}, name


def test_files_that_are_missing_or_elsewhere_are_told(tmp_path: Path) -> None:
    save_vit(tmp_path)
    weights, index = tmp_path / "model.safetensors", tmp_path / "model.safetensors.index.json"
    state = load_file(weights)
    weights.rename(tmp_path / "one.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*none of them"):
        load_source(str(tmp_path))
    index.write_text("[" * 10**5)
    with pytest.raises(CheckpointError, match=r"an index of safetensors files, found .* more than 100 deep"):
        load_source(str(tmp_path))
    index.write_text(json.dumps({"weight_map": dict.fromkeys(state, "../one.safetensors")}))
    with pytest.raises(CheckpointError, match="no safetensors file beside it"):
        load_source(str(tmp_path))
    index.write_text(json.dumps({"weight_map": {**dict.fromkeys(state, "one.safetensors"), "more": "two.safetensors"}}))
    with pytest.raises(CheckpointError, match="two"):
        load_source(str(tmp_path))
    index.write_text(json.dumps({"weight_map": {**dict.fromkeys(state, "one.safetensors"), "more": "one.safetensors"}}))
    with pytest.raises(CheckpointError, match="in one alone: more"):
        load_source(str(tmp_path))
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match="preprocessor_config"):
        load_source(str(tmp_path))


class Touch:
    """Runs code when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[Any, ...]]:
        return Path.touch, (self.path,)


def test_a_pytorch_file_is_read_and_runs_nothing(tmp_path: Path) -> None:
    save_vit(tmp_path)
    expected = load_source(str(tmp_path))
    state = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert load_source(str(tmp_path)).weights_sha256() == expected.weights_sha256()
    torch.save({**state, "more": Touch(tmp_path / "ran")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="could run code"):
        load_source(str(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_fresh_weights_are_of_their_seed(tmp_path: Path) -> None:
    for folder in (save_vit(tmp_path / "vit"), save_clip(tmp_path / "clip")):
        first, again, other = (load_source(str(folder), random_init=True, seed=seed) for seed in (1, 1, 2))
        assert first.weights_sha256() == again.weights_sha256() != other.weights_sha256()
        assert first.weights_sha256() != load_source(str(folder)).weights_sha256()
        assert (first.tag, first.description["init_seed"]) == ("random", 1)


def test_a_tokenizer_is_clip_s_or_is_named(tmp_path: Path) -> None:
    folder = save_clip(tmp_path)
    with pytest.raises(CheckpointError, match="--tokenizer clip"):
        load_towers(str(folder))
    (folder / "vocab.json").write_text("[" * 10**5)
    with pytest.raises(CheckpointError, match=r"vocab\.json or tokenizer\.json, found .* more than 100 deep"):
        load_towers(str(folder))
    (folder / "vocab.json").write_text(json.dumps({"a": 0, "b": 1}))
    with pytest.raises(CheckpointError, match="another one, of 2 tokens"):
        load_towers(str(folder))
    assert load_towers(str(folder), tokenizer="clip").tokenize(["a"]).shape == (1, 8)
    with pytest.raises(CheckpointError, match="model_type clip, found vit"):
        load_towers(str(save_vit(tmp_path / "vit")))


def test_text_towers_that_open_clip_has_not_are_refused(tmp_path: Path) -> None:
    folder = save_clip(tmp_path)
    text = json.loads((folder / "config.json").read_text())["text_config"]
    change(folder / "config.json", text_config={**text, "eos_token_id": 5})
    with pytest.raises(CheckpointError, match="eos_token_id 5"):
        load_source(str(folder))
    change(folder / "config.json", text_config={**text, "hidden_act": "gelu"})
    with pytest.raises(CheckpointError, match="one activation"):
        load_source(str(folder))
    change(folder / "config.json", text_config={**text, "eos_token_id": 2})
    load_source(str(folder))


def evaluate(*arguments: object) -> EvalReport:
    result = CliRunner().invoke(app, [*map(str, arguments)])
    if result.exception is not None:
        raise result.exception
    return EvalReport.load(Path(str(arguments[-1])))


def test_commands_judge_them_at_another_size(tmp_path: Path, folders: Folders) -> None:
    data = ["--test", folders.test, "--limit-test", 20, "--image-size", 24, "--out", tmp_path / "report.json"]
    vit, clip = save_vit(tmp_path / "vit"), save_clip(tmp_path / "clip")
    knn = evaluate("knn", vit, "--train", folders.train, "--limit-train", 30, "--k", 5, *data)
    zeroshot = evaluate("zeroshot", clip, "--tokenizer", "clip", *data)
    for report, how in ((knn, "timm"), (zeroshot, "open_clip")):
        told = report.encoder["position_embedding"]
        assert isinstance(told, dict)
        assert (told["from"], told["to"]) == ([2, 2], [3, 3])
        assert how in told["how"]
        assert report.protocol["preprocessing"]["image_size"] == 24  # type: ignore[index]
        assert report.encoder["kind"] == "Hugging Face folder"
    assert "square" in str(knn.protocol["preprocessing"])


def test_a_size_that_is_no_multiple_of_the_patch_is_refused(tmp_path: Path) -> None:
    for folder in (save_vit(tmp_path / "vit"), save_clip(tmp_path / "clip")):
        with pytest.raises(InputError, match=r"multiple of the patch size 8, found 20.*above: 24"):
            load_source(str(folder), architecture=Architecture(str(folder), 20))


def test_a_configuration_that_is_too_deep_is_told(tmp_path: Path) -> None:
    folder = save_vit(tmp_path)
    (folder / "preprocessor_config.json").write_text("[" * 10**5)
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json: .* more than 100 deep"):
        load_source(str(folder))
    (folder / "config.json").write_text("[" * 10**5)
    assert not is_hf_folder(folder)
