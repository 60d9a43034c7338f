"""open_clip's names: published weights bring their preprocessing and activation, and without a network one is told."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import open_clip
import pytest
import torch
from open_clip import factory, pretrained
from safetensors.torch import load_file, save_file

from data_pipeline.errors import CheckpointError, InputError
from pretrain.evals.sources import open_clip_names as open_clip_sources
from pretrain.evals.sources.load import load_source
from pretrain.evals.sources.timm_names import Architecture
from pretrain.evals.sources.towers import load_towers
from pretrain.models.weights_files import Part

NAME = "ViT-S-32-alt"
TAG = f"{NAME}:small"
SMALLER = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 224, "layers": 2, "width": 64, "patch_size": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    """Under that name stands a model with a twentieth of the weights, as open_clip's own are large."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(factory._MODEL_CONFIGS, NAME, SMALLER)
        yield


@pytest.fixture(scope="module")
def weights(small: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    save_file(open_clip.create_model(NAME).state_dict(), path)
    return path


@pytest.fixture
def tag(monkeypatch: pytest.MonkeyPatch, weights: Path) -> dict[str, object]:
    """Published weights, of which open_clip's table says what it does of others; `file` stands for the download."""
    published: dict[str, object] = {
        "hf_hub": "someone/model/", "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "interpolation": "bilinear",
        "resize_mode": "squash", "quick_gelu": True, "file": str(weights),
    }  # fmt: skip
    monkeypatch.setitem(pretrained._PRETRAINED, NAME, {"small": published})
    return published


def test_a_tag_brings_weights_preprocessing_and_activation(tag: dict[str, object], weights: Path) -> None:
    encoder = load_source(TAG)
    theirs = open_clip.create_model(NAME, pretrained=str(weights), force_quick_gelu=True).eval()
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        expected = theirs.encode_image(images)
        torch.testing.assert_close(encoder.module.eval()(images), expected, rtol=0, atol=1e-5)
        plain = load_source(NAME, weights=weights)
        assert not torch.allclose(plain.module.eval()(images), expected, atol=1e-3)
    told = encoder.described_preprocessing()
    assert (told["mean"], told["interpolation"]) == ([0.1, 0.2, 0.3], "bilinear")
    assert "square" in str(told["resize"])
    assert plain.described_preprocessing()["interpolation"] == "bicubic"
    towers = load_towers(TAG)
    assert towers.preprocessing == encoder.preprocessing
    by_hand = load_source(TAG, weights=weights)
    assert (by_hand.weights_sha256(), by_hand.described_preprocessing()) == (encoder.weights_sha256(), told)


def test_weights_without_a_tag_are_told_how_those_of_tags_are_used(tag: dict[str, object], weights: Path) -> None:
    for load in (load_source, load_towers):
        (note,) = load(NAME, weights=weights).notes
        assert "small have mean (0.1, 0.2, 0.3), std (0.4, 0.5, 0.6), interpolation bilinear" in note
        assert f"resize_mode squash, quick_gelu True. If these weights are of such a tag, name it: {NAME}:TAG" in note
        assert load(TAG, weights=weights).notes == load(NAME, random_init=True).notes == ()
    tag.clear()
    tag.update({"hf_hub": "someone/model/", "quick_gelu": False})
    assert load_towers(NAME, weights=weights).notes == ()


def test_what_cannot_be_downloaded_can_be_brought(
    tag: dict[str, object], weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(_: object) -> str:
        raise ConnectionError("no network")

    monkeypatch.setattr(open_clip_sources, "download_pretrained", unreachable)
    for load in (load_source, load_towers):
        with pytest.raises(InputError, match=f"no network.*someone/model/ and name it: {TAG} --weights FILE"):
            load(TAG)
    load_source(TAG, weights=weights)


def test_fresh_weights_and_another_size() -> None:
    encoder = load_source(NAME, random_init=True, seed=3, architecture=Architecture(NAME, 96))
    assert encoder.description["position_embedding"] == {
        "from": [7, 7], "to": [3, 3], "how": "bicubic, antialiased, as open_clip's resize_pos_embed"
    }  # fmt: skip
    assert encoder.description["init_seed"] == 3
    assert encoder.module(torch.zeros(1, 3, 96, 96)).shape == (1, 32)


@pytest.mark.parametrize(
    ("spec", "arguments", "told"),
    [
        (NAME, {}, "tag of published weights, found none"),
        (NAME, {"random_init": True, "weights": Path("w")}, "the first two"),
        ("ViT-B-32:laion2b_s34b_b79", {}, "Nearest: laion2b_s34b_b79k"),
        (f"{NAME}:any", {}, "Nearest: none"),
        ("coca_ViT-B-32", {"random_init": True}, "CoCa"),
        ("test_vit", {"weights": Path("w")}, "--weights: expected none"),
        (NAME, {"random_init": True, "architecture": Architecture("test_vit")}, "its own architecture"),
    ],
)
def test_what_makes_no_sense_is_an_input_error(spec: str, arguments: dict[str, object], told: str) -> None:
    with pytest.raises(InputError, match=told):
        load_source(spec, **arguments)  # type: ignore[arg-type]


def test_more_than_the_towers_is_left_out_by_name(weights: Path, tmp_path: Path) -> None:
    more = {"position_ids": torch.arange(3), "visual.mask_token": torch.zeros(2)}
    save_file(load_file(weights) | more, path := tmp_path / "more.safetensors")
    ignore = ("*mask_token", "position_ids")
    for load, options in ((load_source, {"part": Part(ignore=ignore)}), (load_towers, {"ignore": ignore})):
        with pytest.raises(CheckpointError, match=r"2 unexpected: encoder.mask_token, position_ids"):
            load(NAME, weights=path)  # type: ignore[operator]
        found = load(NAME, weights=path, **options)  # type: ignore[operator]
        assert found.weights_sha256() == load(NAME, weights=weights).weights_sha256()  # type: ignore[operator]
        assert found.description["weights_ignored"]["names"] == ["position_ids", "visual.mask_token"]
        assert "2 tensors were ignored, as asked" in found.notes[-1]
    with pytest.raises(CheckpointError, match=r"--weights-ignore visual.proj: .* only what it needs"):
        load_towers(NAME, weights=path, ignore=("visual.proj",))
