"""The same two towers through every layout are one CLIP, and its image tower one encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.datasets.read import open_dataset
from data_pipeline.procedural.make import make
from pretrain.evals.encoder import Encoder
from pretrain.evals.sources.load import load_source
from pretrain.evals.sources.towers import load_towers
from pretrain.evals.zeroshot.protocol import Prompts, ZeroShot
from pretrain.models.towers import Towers
from tests.evals.layouts import CLIP_PREPROCESSOR, as_open_clip, features, hf_clip, save_hf, transformers

CLIP_LAYOUTS = ["hf_clip", "clip", "clip/checkpoints/step_00000007", "clip/encoder", "as_open_clip"]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("shapes") / "test"
    make("shapes", folder, num_samples=60, size=16, split="test", shard_size=60)
    return str(folder)


@pytest.fixture(scope="module")
def zero_shot(layouts: Path, shapes: str) -> tuple[ZeroShot, Any]:
    evaluator = ZeroShot(open_dataset(shapes), Prompts.named("photo"))
    return evaluator, evaluator.run(load_towers(str(layouts / "hf_clip")))


@pytest.mark.parametrize("layout", CLIP_LAYOUTS)
def test_one_pair_of_towers_in_every_layout_is_one_clip(
    layouts: Path, layout: str, zero_shot: tuple[ZeroShot, Any]
) -> None:
    path = as_open_clip(layouts, layouts / layout) if layout == "as_open_clip" else layouts / layout
    check_clip(load_towers(str(path)), transformers.CLIPModel.from_pretrained(layouts / "hf_clip").eval())
    report, expected = zero_shot[0].run(load_towers(str(path))), zero_shot[1]
    assert report.metrics == expected.metrics
    assert (report.outcomes.predicted == expected.outcomes.predicted).all()
    assert report.weights_sha256 == expected.weights_sha256
    check_image_side(load_source(str(path)), layouts / "hf_clip")


def check_clip(towers: Towers, theirs: Any) -> None:
    tokens = towers.tokenize(["a red star", "a photo of a large blue circle, cut off"])
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(input_ids=tokens, pixel_values=images)
        torch.testing.assert_close(towers.encode_image(images), expected.image_embeds, rtol=0, atol=1e-5)
        torch.testing.assert_close(towers.encode_text(tokens), expected.text_embeds, rtol=0, atol=1e-5)
        logits = towers.logit_scale * towers.encode_image(images) @ towers.encode_text(tokens).T
    torch.testing.assert_close(logits, expected.logits_per_image, rtol=0, atol=1e-4)


def check_image_side(encoder: Encoder, folder: Path) -> None:
    theirs = transformers.CLIPVisionModelWithProjection.from_pretrained(folder).eval()
    images, found = features(encoder, 16)
    with torch.no_grad():
        torch.testing.assert_close(found, theirs(images).image_embeds, rtol=0, atol=1e-5)


def test_quick_gelu_and_image_towers_alone(tmp_path: Path) -> None:
    folder = save_hf(hf_clip("quick_gelu"), tmp_path / "both", CLIP_PREPROCESSOR)
    check_clip(load_towers(str(folder), tokenizer="clip"), transformers.CLIPModel.from_pretrained(folder).eval())
    projected = transformers.CLIPVisionModelWithProjection.from_pretrained(folder).eval()
    check_image_side(load_source(str(save_hf(projected, tmp_path / "projected", CLIP_PREPROCESSOR))), folder)
    alone = transformers.CLIPVisionModel.from_pretrained(folder).eval()
    images, found = features(load_source(str(save_hf(alone, tmp_path / "alone", CLIP_PREPROCESSOR))), 16)
    with torch.no_grad():
        torch.testing.assert_close(found, alone(images).pooler_output, rtol=0, atol=1e-5)
