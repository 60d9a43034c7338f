"""The same ViT through every layout is one encoder: equal features, equal results; also at another image size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from torch import Tensor

from data_pipeline.datasets.read import open_dataset
from pretrain.evals.encoder import Encoder
from pretrain.evals.features.extract import Extraction
from pretrain.evals.knn.config import KnnConfig
from pretrain.evals.knn.protocol import Knn
from pretrain.evals.sources.load import load_source
from pretrain.evals.sources.timm_names import Architecture
from tests.evals.conftest import Folders
from tests.evals.layouts import ARCHITECTURE, VIT_PREPROCESSOR, features, hf_vit, loaded, save_hf, transformers

LAYOUTS = ["run", "checkpoint", "run/encoder", "timm", "weights.pth", "weights.safetensors", "open_clip", "hf"]


@pytest.fixture(scope="module")
def expected(layouts: Path) -> Tensor:
    """By transformers."""
    model = transformers.ViTModel.from_pretrained(layouts / "hf").eval()
    images, _ = features(loaded(layouts, "hf"), 160)
    with torch.no_grad():
        found: Tensor = model(images).last_hidden_state[:, 0]
    return found


@pytest.fixture(scope="module")
def neighbours(layouts: Path, folders: Folders) -> Callable[[Encoder], Any]:
    config = KnnConfig(train=folders.train, test=folders.test, k=5, max_train=120, max_test=60)
    return Knn(open_dataset(folders.train), open_dataset(folders.test), config, extraction=Extraction()).run


@pytest.fixture(scope="module")
def judged(layouts: Path, neighbours: Callable[[Encoder], Any]) -> Any:
    report = neighbours(loaded(layouts, "hf"))
    assert report.value > 30  # of ten classes: equal results are not equal noise
    return report


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_vit_in_every_layout_is_one_encoder(
    layouts: Path, layout: str, expected: Tensor, neighbours: Callable[[Encoder], Any], judged: Any
) -> None:
    encoder = loaded(layouts, layout)
    torch.testing.assert_close(features(encoder, 160)[1], expected, rtol=0, atol=1e-5)
    report = neighbours(encoder)
    assert report.value == judged.value
    assert (report.outcomes.predicted == judged.outcomes.predicted).all()
    assert report.outcomes.keys == judged.outcomes.keys
    if layout != "open_clip":  # whose names begin with the trunk's
        assert report.weights_sha256 == judged.weights_sha256


@pytest.mark.parametrize(
    ("kind", "changed", "options", "left_out"),
    [
        (transformers.ViTForImageClassification, {"num_labels": 3}, {}, ["classifier"]),
        (transformers.ViTModel, {"layer_norm_eps": 1e-2}, {}, ["pooler"]),
        (transformers.ViTModel, {"hidden_act": "quick_gelu", "qkv_bias": False}, {}, ["pooler"]),
        (transformers.ViTModel, {"hidden_act": "gelu_new"}, {"max_shard_size": "200KB"}, ["pooler"]),
        (transformers.ViTMAEModel, {"mask_ratio": 0.0}, {}, []),
    ],
)
def test_vits_of_transformers_compute_here_what_they_compute_there(
    tmp_path: Path, kind: Any, changed: dict[str, Any], options: dict[str, Any], left_out: list[str]
) -> None:
    theirs = hf_vit(kind, num_hidden_layers=2, **changed)
    encoder = load_source(str(save_hf(theirs, tmp_path, VIT_PREPROCESSOR, **options)))
    images, found = features(encoder, 160)
    with torch.no_grad():
        tokens = (theirs.vit if hasattr(theirs, "vit") else theirs)(images).last_hidden_state
    torch.testing.assert_close(found, tokens[:, 0], rtol=0, atol=1e-5)
    assert encoder.description["left_out"] == left_out
    assert (tmp_path / "model.safetensors.index.json").is_file() == bool(options)


@pytest.mark.parametrize("layout", ["run", "checkpoint", "timm", "weights.safetensors", "test_vit", "hf", "hf_clip"])
def test_another_image_size_interpolates_the_positions_and_says_so(layouts: Path, layout: str) -> None:
    source = layout if layout == "test_vit" else str(layouts / layout)
    size, patch = (32, 8) if layout == "hf_clip" else (224, 16)
    name = "test_vit" if layout.startswith("weights") else source
    fresh = layout == "test_vit"
    encoder = load_source(source, architecture=Architecture(name, size), random_init=fresh)
    assert encoder.preprocessing.image_size == encoder.described_preprocessing()["image_size"] == size
    _, found = features(encoder, size)
    if fresh:
        return
    told = encoder.description["position_embedding"]
    assert isinstance(told, dict)
    assert (told["from"], told["to"]) == ([2, 2] if size == 32 else [10, 10], [size // patch] * 2)
    small = load_source(source, architecture=ARCHITECTURE if layout.startswith("weights") else None)
    if layout == "hf_clip":
        theirs = open_clip.create_model("local-dir:" + str(layouts / "clip" / "encoder"), force_image_size=size).eval()
        images, _ = features(encoder, size)
        with torch.no_grad():
            torch.testing.assert_close(found, theirs.encode_image(images), rtol=0, atol=1e-5)
    else:
        theirs = timm.create_model("test_vit", num_classes=0, img_size=size).eval()
        positions = small.module.state_dict()
        theirs.load_state_dict(timm.models.vision_transformer.checkpoint_filter_fn(positions, theirs))
        images, _ = features(encoder, size)
        with torch.no_grad():
            torch.testing.assert_close(found, theirs(images), rtol=0, atol=1e-5)
