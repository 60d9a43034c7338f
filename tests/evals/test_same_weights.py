"""The same weights through every layout are one encoder: equal features, equal results; and one that is not whole is
refused in each of them with the names that differ."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from data_pipeline.errors import CheckpointError
from data_pipeline.procedural.make import make
from data_pipeline.read import open_dataset
from pretrain.collectives import World
from pretrain.evals.encoder import Encoder
from pretrain.evals.features import Extraction
from pretrain.evals.knn import Knn
from pretrain.evals.sources import load_source
from pretrain.evals.timm_sources import Architecture
from pretrain.evals.tower_sources import load_towers
from pretrain.evals.zeroshot import Prompts, ZeroShot
from pretrain.models.encoders import save_encoder
from pretrain.models.open_clip_models import build_open_clip
from pretrain.models.tower_folders import save_towers
from pretrain.models.towers import Towers
from pretrain.objectives.build import build_objective
from pretrain.recipe import InlineKnn, Recipe, Views
from pretrain.recipe_io import dump
from pretrain.state import Progress, RunState
from tests.evals.conftest import Folders
from tests.ranks import run_ranks

os.environ["HF_HUB_OFFLINE"] = "1"
import transformers

HALF = (0.5, 0.5, 0.5)
ARCHITECTURE = Architecture("test_vit")  # timm's: 64 wide, 6 deep, patches of 16, 160 px, shown 160 of 168
VIT = {
    "hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 2, "intermediate_size": 192,
    "image_size": 160, "patch_size": 16, "layer_norm_eps": 1e-6,
}  # fmt: skip
VIT_PREPROCESSOR = {
    "image_processor_type": "ViTImageProcessor", "size": {"height": 168, "width": 168}, "do_center_crop": True,
    "crop_size": {"height": 160, "width": 160}, "resample": 3, "image_mean": HALF, "image_std": HALF,
}  # fmt: skip
CLIP_PREPROCESSOR = {
    "image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 18}, "do_center_crop": True,
    "crop_size": {"height": 16, "width": 16}, "resample": 3, "image_mean": HALF, "image_std": HALF,
}  # fmt: skip
TOWER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
LAYOUTS = ["run", "checkpoint", "run/encoder", "timm", "weights.pth", "weights.safetensors", "open_clip", "hf"]
CLIP_LAYOUTS = ["hf_clip", "clip", "clip/checkpoints/step_00000007", "clip/encoder", "as_open_clip"]


def perturbed(module: nn.Module) -> nn.Module:
    """No two parameters alike, so that none can stand for another unseen."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p), alpha=0.05)
    return module.eval()


def hf_vit(kind: Any = transformers.ViTModel, **changed: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.ViTMAEConfig if "MAE" in kind.__name__ else transformers.ViTConfig
    return perturbed(kind(config(**{**VIT, **changed})))


def save_hf(model: Any, folder: Path, preprocessor: Mapping[str, object], **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return folder


def recipe(kind: str) -> Recipe:
    vit = {"name": "test_vit", "image_size": 160}
    towers = {
        "library": "open_clip", "name": "tiny", "image_size": 16, "embed_dim": 8,
        "image": {"width": 32, "layers": 2, "heads": 2, "patch_size": 8, "mlp_ratio": 2},
        "text": {"width": 32, "layers": 2, "heads": 2, "mlp_ratio": 2, "context_length": 8},
    }  # fmt: skip
    views = {"eval_crop": 16 / 18 if kind == "clip" else 0.95}
    return Recipe.model_validate(
        {
            "name": kind,
            "data": {"train": "shards", "mean": HALF, "std": HALF, "views": views},
            "model": towers if kind == "clip" else vit,
            "objective": {"kind": "clip"} if kind == "clip" else {"kind": "supervised", "num_classes": 3},
            "optim": {"base_lr": 1e-3},
            "schedule": {"steps": 10},
            "batch": {"global_size": 8},
        }
    )  # fmt: skip


def save_runs(world: World, root: Path, states: dict[str, dict[str, Tensor]]) -> None:
    """Of each kind a run as trainers leave it, and runs whose checkpoint has a fault."""
    from pretrain.checkpoint_writer import CheckpointWriter
    from pretrain.engine import Engine

    for kind, fault in [("supervised", ""), ("clip", ""), *(("supervised", fault) for fault in FAULTS)]:
        r, folder = recipe(kind), root / (fault or kind)
        objective = build_objective(r.model, r.objective)
        if kind == "clip":
            objective.load_state_dict(states[kind])
        else:
            objective.encoder.load_state_dict(states[kind])
        if fault:
            break_module(objective.encoder, fault)
        engine = Engine(
            objective, r.optim, r.engine, world=world, device=torch.device("cpu"), micro_size=8, accumulation=1, seed=0
        )
        writer = CheckpointWriter(folder / "checkpoints", engine.state, world=world, keep_last=1, say=print)
        writer.save(RunState(Progress(7, 10, 56)))
        writer.finish()
        (folder / "recipe.yaml").write_text(dump(r))


def break_module(encoder: nn.Module, fault: str) -> None:
    norm = encoder.norm
    assert isinstance(norm, nn.LayerNorm)
    match fault:
        case "missing":
            encoder.norm = nn.LayerNorm(64, bias=False)
        case "renamed":
            encoder.norm, encoder.other = nn.LayerNorm(64, bias=False), nn.LayerNorm(64)
        case "shape":
            encoder.norm = nn.LayerNorm(63)
        case "nan":
            norm.bias.data[3] = torch.nan


FAULTS = ["missing", "renamed", "shape", "nan"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every layout of one ViT, which transformers made, and of one pair of towers."""
    root = tmp_path_factory.mktemp("layouts")
    save_hf(hf_vit(), root / "hf", VIT_PREPROCESSOR)
    save_hf(hf_clip("gelu"), root / "hf_clip", CLIP_PREPROCESSOR)
    save_vocabulary(root / "hf_clip")
    state = dict(load_source(str(root / "hf")).module.state_dict())
    towers = dict(load_towers(str(root / "hf_clip")).module.state_dict())
    run_ranks(save_runs, 1, root, {"supervised": state, "clip": towers})
    (root / "supervised").rename(root / "run")
    (root / "checkpoint").symlink_to(root / "run" / "checkpoints" / "step_00000007")
    r, clip = recipe("supervised"), recipe("clip")
    save_encoder(root / "run" / "encoder", state, r.model, HALF, HALF, r.data.views)  # type: ignore[arg-type]
    views = Views(eval_crop=16 / 18)
    save_towers(root / "clip" / "encoder", towers, clip.model, None, None, "clip", HALF, HALF, views)
    with_head = timm.create_model("test_vit", num_classes=3)
    with_head.load_state_dict({**with_head.state_dict(), **state})
    timm.models.save_for_hf(with_head, root / "timm", safe_serialization=True)
    torch.save({"model": state, "epoch": 3}, root / "weights.pth")
    save_file(state, root / "weights.safetensors")
    save_open_clip_with_timm(root / "open_clip", state)
    return root


def save_open_clip_with_timm(folder: Path, state: Mapping[str, Tensor]) -> None:
    config: dict[str, Any] = {
        "embed_dim": 64,
        "vision_cfg": {
            "timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "none", "image_size": 160,
        },
        "text_cfg": {"context_length": 6, "vocab_size": 10, "width": 16, "heads": 2, "layers": 1},
    }  # fmt: skip
    model = build_open_clip(config)
    model.visual.trunk.load_state_dict(state)  # type: ignore[union-attr, operator]
    folder.mkdir()
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    pixels = {"mean": HALF, "std": HALF, "interpolation": "bicubic", "resize_mode": "squash"}
    told = {"model_cfg": config, "preprocess_cfg": pixels, "eval_crop": 160 / 168}
    (folder / "open_clip_config.json").write_text(json.dumps(told))


def loaded(root: Path, layout: str) -> Encoder:
    return load_source(str(root / layout), architecture=ARCHITECTURE if layout.startswith("weights") else None)


def features(encoder: Encoder, size: int) -> tuple[Tensor, Tensor]:
    images = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return images, encoder.module.eval()(images)


@pytest.fixture(scope="module")
def expected(root: Path) -> Tensor:
    """By transformers."""
    model = transformers.ViTModel.from_pretrained(root / "hf").eval()
    images, _ = features(loaded(root, "hf"), 160)
    with torch.no_grad():
        found: Tensor = model(images).last_hidden_state[:, 0]
    return found


@pytest.fixture(scope="module")
def neighbours(root: Path, folders: Folders) -> Callable[[Encoder], Any]:
    config = InlineKnn(kind="knn", train=folders.train, test=folders.test, k=5, max_train=120, max_test=60)
    return Knn(open_dataset(folders.train), open_dataset(folders.test), config, extraction=Extraction()).run


@pytest.fixture(scope="module")
def judged(root: Path, neighbours: Callable[[Encoder], Any]) -> Any:
    report = neighbours(loaded(root, "hf"))
    assert report.value > 30  # of ten classes: equal results are not equal noise
    return report


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_vit_in_every_layout_is_one_encoder(
    root: Path, layout: str, expected: Tensor, neighbours: Callable[[Encoder], Any], judged: Any
) -> None:
    encoder = loaded(root, layout)
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


def hf_clip(activation: str) -> Any:
    torch.manual_seed(0)
    vision = {**TOWER, "image_size": 16, "patch_size": 8, "projection_dim": 8, "hidden_act": activation}
    text = {**TOWER, "max_position_embeddings": 8, "hidden_act": activation}
    config = transformers.CLIPConfig(projection_dim=8, vision_config=vision, text_config=text)
    return perturbed(transformers.CLIPModel(config))


def save_vocabulary(folder: Path) -> None:
    words = open_clip.SimpleTokenizer().encoder
    ends = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    (folder / "vocab.json").write_text(json.dumps({ends.get(word, word): i for word, i in words.items()}))


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("shapes") / "test"
    make("shapes", folder, num_samples=60, size=16, split="test", shard_size=60)
    return str(folder)


def as_open_clip(root: Path, folder: Path) -> Path:
    """The weights of `clip/encoder` in a folder with a configuration that open_clip's users write."""
    folder.mkdir(exist_ok=True)
    tower = {"width": 32, "layers": 2, "mlp_ratio": 2}
    told = {
        "model_cfg": {
            "embed_dim": 8,
            "vision_cfg": {**tower, "head_width": 16, "image_size": 16, "patch_size": 8},
            "text_cfg": {**tower, "heads": 2, "context_length": 8},
        },
        "preprocess_cfg": {"mean": HALF, "std": HALF, "interpolation": "bicubic", "resize_mode": "shortest"},
        "eval_crop": 16 / 18,
    }
    state = load_file(root / "clip" / "encoder" / "open_clip_model.safetensors")
    top = {name.removeprefix("text."): tensor for name, tensor in state.items()}  # as in CLIP's own weights
    save_file(top, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps(told))
    return folder


@pytest.fixture(scope="module")
def zero_shot(root: Path, shapes: str) -> tuple[ZeroShot, Any]:
    evaluator = ZeroShot(open_dataset(shapes), Prompts.named("photo"))
    return evaluator, evaluator.run(load_towers(str(root / "hf_clip")))


@pytest.mark.parametrize("layout", CLIP_LAYOUTS)
def test_one_pair_of_towers_in_every_layout_is_one_clip(
    root: Path, layout: str, zero_shot: tuple[ZeroShot, Any]
) -> None:
    path = as_open_clip(root, root / layout) if layout == "as_open_clip" else root / layout
    check_clip(load_towers(str(path)), transformers.CLIPModel.from_pretrained(root / "hf_clip").eval())
    report, expected = zero_shot[0].run(load_towers(str(path))), zero_shot[1]
    assert report.metrics == expected.metrics
    assert (report.outcomes.predicted == expected.outcomes.predicted).all()
    assert report.weights_sha256 == expected.weights_sha256
    check_image_side(load_source(str(path)), root / "hf_clip")


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


# Of each layout: its weights file, and a tensor in it.
TENSORS = {
    "run/encoder": ("model.safetensors", "norm.bias"),
    "timm": ("model.safetensors", "norm.bias"),
    "weights.safetensors": ("", "norm.bias"),
    "weights.pth": ("", "norm.bias"),
    "open_clip": ("open_clip_model.safetensors", "visual.trunk.norm.bias"),
    "clip/encoder": ("open_clip_model.safetensors", "visual.ln_post.bias"),
    "hf": ("model.safetensors", "encoder.layer.3.attention.attention.key.bias"),
    "hf_clip": ("model.safetensors", "text_model.encoder.layers.1.self_attn.v_proj.bias"),
}


def break_state(state: dict[str, Tensor], name: str, fault: str) -> None:
    match fault:
        case "missing":
            del state[name]
        case "renamed":
            state["other"] = state.pop(name)
        case "shape":
            state[name] = state[name][:-1].clone()
        case "nan":
            state[name][3] = torch.nan


TOLD = {
    "missing": "1 missing: {}$",
    "renamed": "1 missing: {}; 1 unexpected: .*other",
    "shape": "1 of another shape: {}$",
    "nan": "1 not finite: {}$",
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("layout", TENSORS)
def test_weights_that_are_not_whole_are_refused_by_name(root: Path, tmp_path: Path, layout: str, fault: str) -> None:
    file, name = TENSORS[layout]
    broken = tmp_path / Path(layout).name
    if file:
        broken.mkdir()
        for path in (root / layout).iterdir():
            (broken / path.name).write_bytes(path.read_bytes())
        for path in broken.glob("*config.json"):  # as a tool writes it that takes no hash
            told = json.loads(path.read_text())
            told.pop("file_sha256", None)
            path.write_text(json.dumps(told))
    source = root / layout / file if file else root / layout
    state = torch.load(source)["model"] if source.suffix == ".pth" else load_file(source)
    break_state(state, name, fault)
    target = broken / file if file else broken
    torch.save({"model": state}, target) if target.suffix == ".pth" else save_file(state, target)
    ours = name.replace("visual.", "encoder.")
    with pytest.raises(CheckpointError) as error:
        load_source(str(broken), architecture=None if file else ARCHITECTURE)
    check_told(error.value, TOLD[fault].format(ours))
    if "clip" in layout and layout != "open_clip":
        with pytest.raises(CheckpointError) as error:
            load_towers(str(broken))
        check_told(error.value, TOLD[fault].format(ours))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_checkpoint_that_is_not_whole_is_refused_by_name(root: Path, fault: str) -> None:
    with pytest.raises(CheckpointError) as error:
        load_source(str(root / fault / "checkpoints" / "step_00000007"))
    found = error.value.found
    assert "norm.bias" in found
    assert {"missing": "1 missing", "renamed": "1 missing", "shape": "2 of another shape", "nan": "1 not finite"}[
        fault
    ] in found


def check_told(error: CheckpointError, pattern: str) -> None:
    assert re.search(pattern, error.found), error


@pytest.mark.parametrize("layout", ["run", "checkpoint", "timm", "weights.safetensors", "test_vit", "hf", "hf_clip"])
def test_another_image_size_interpolates_the_positions_and_says_so(root: Path, layout: str) -> None:
    source = layout if layout == "test_vit" else str(root / layout)
    size, patch = (32, 8) if layout == "hf_clip" else (224, 16)
    name = "test_vit" if layout.startswith("weights") else source
    fresh = layout == "test_vit"
    encoder = load_source(source, architecture=Architecture(name, size), random_init=fresh)
    assert encoder.image_size == encoder.preprocessing()["image_size"] == size
    _, found = features(encoder, size)
    if fresh:
        return
    told = encoder.description["position_embedding"]
    assert isinstance(told, dict)
    assert (told["from"], told["to"]) == ([2, 2] if size == 32 else [10, 10], [size // patch] * 2)
    small = load_source(source, architecture=ARCHITECTURE if layout.startswith("weights") else None)
    if layout == "hf_clip":
        theirs = open_clip.create_model("local-dir:" + str(root / "clip" / "encoder"), force_image_size=size).eval()
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
