"""One ViT and one pair of towers in every layout that encoders come in, and runs whose weights have a fault."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from data_pipeline.samples.preprocessing import Preprocessing
from pretrain.evals.encoder import Encoder
from pretrain.evals.sources.load import load_source
from pretrain.evals.sources.timm_names import Architecture
from pretrain.evals.sources.towers import load_towers
from pretrain.models.encoder_folders import save_encoder
from pretrain.models.open_clip_models import build_open_clip
from pretrain.models.tower_folders import save_towers
from pretrain.objectives.kinds import build_objective
from pretrain.recipe.files import dump
from pretrain.recipe.recipe import Recipe
from pretrain.runtime.collectives import World
from pretrain.runtime.state import Progress, RunState
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
FAULTS = ["missing", "renamed", "shape", "nan"]


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
            "engine": {"precision": "fp32"},
        }
    )  # fmt: skip


def save_runs(world: World, root: Path, states: dict[str, dict[str, Tensor]]) -> None:
    """Of each kind a run as trainers leave it, and runs whose checkpoint has a fault."""
    from pretrain.checkpoints.writer import CheckpointWriter
    from pretrain.engine.engine import Engine

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


def write_layouts(root: Path) -> None:
    """Every layout of one ViT, which transformers made, and of one pair of towers."""
    save_hf(hf_vit(), root / "hf", VIT_PREPROCESSOR)
    save_hf(hf_clip("gelu"), root / "hf_clip", CLIP_PREPROCESSOR)
    save_vocabulary(root / "hf_clip")
    state = dict(load_source(str(root / "hf")).module.state_dict())
    towers = dict(load_towers(str(root / "hf_clip")).module.state_dict())
    run_ranks(save_runs, 1, root, {"supervised": state, "clip": towers})
    (root / "supervised").rename(root / "run")
    (root / "checkpoint").symlink_to(root / "run" / "checkpoints" / "step_00000007")
    r, clip = recipe("supervised"), recipe("clip")
    pixels = Preprocessing(r.model.judged_size, HALF, HALF, eval_crop=r.data.views.eval_crop)
    save_encoder(root / "run" / "encoder", state, r.model, pixels)  # type: ignore[arg-type]
    pixels = Preprocessing(clip.model.image_size, HALF, HALF, eval_crop=16 / 18)
    save_towers(root / "clip" / "encoder", towers, clip.model, None, None, "clip", pixels)
    with_head = timm.create_model("test_vit", num_classes=3)
    with_head.load_state_dict({**with_head.state_dict(), **state})
    timm.models.save_for_hf(with_head, root / "timm", safe_serialization=True)
    torch.save({"model": state, "epoch": 3}, root / "weights.pth")
    save_file(state, root / "weights.safetensors")
    save_open_clip_with_timm(root / "open_clip", state)
