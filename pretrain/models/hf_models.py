"""ViT, ViTMAE and CLIP of Hugging Face's transformers as timm's and open_clip's modules, which compute the same.

Weights go by name: under Hugging Face's names stand views of the module's own tensors, so that what differs is told
in the names of the file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from open_clip.model import CLIPVisionCfg, _build_vision_tower
from timm.layers import LayerNorm, get_act_layer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from data_pipeline.errors import CheckpointError
from pretrain.models.hf_folders import followed
from pretrain.models.open_clip_models import build_open_clip
from pretrain.models.strict_loading import check_exactly
from pretrain.models.towers import TowerModules, TwoTowers

VIT, CLIP, CLIP_IMAGE = ("vit", "vit_mae"), "clip", "clip_vision_model"

# What transformers may leave out of a configuration, being the default of its class.
_OF_VIT = {
    "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
    "hidden_act": "gelu", "layer_norm_eps": 1e-12, "image_size": 224, "patch_size": 16, "num_channels": 3,
    "qkv_bias": True,
}  # fmt: skip
_OF_CLIP_IMAGE = {
    "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
    "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "image_size": 224, "patch_size": 32, "num_channels": 3,
    "projection_dim": 512,
}  # fmt: skip
_OF_CLIP_TEXT = {
    "hidden_size": 512, "num_hidden_layers": 12, "num_attention_heads": 8, "intermediate_size": 2048,
    "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "max_position_embeddings": 77, "vocab_size": 49408,
    "eos_token_id": 49407,
}  # fmt: skip

_ACTIVATIONS = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
_LEGACY_END = 2  # an eos_token_id of old files, with which the end is the highest token

_BUILDABLE = "values that a model can be built from"

# Patterns of our names and theirs; {} stands for the three parts of what is one tensor here.
Names = tuple[tuple[str, str], ...]
_VIT_NAMES: Names = (
    (r"^cls_token$", "embeddings.cls_token"),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^blocks\.", "encoder.layer."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.attn\.qkv\.", ".attention.attention.{}."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
    (r"^norm\.", "layernorm."),
)
_CLIP_NAMES: Names = (
    (r"^class_embedding$", "embeddings.class_embedding"),
    (r"^positional_embedding$", "embeddings.position_embedding.weight"),
    (r"^conv1\.", "embeddings.patch_embedding."),
    (r"^token_embedding\.", "embeddings.token_embedding."),
    (r"^ln_pre\.", "pre_layrnorm."),  # transformers' spelling
    (r"^ln_post\.", "post_layernorm."),
    (r"^ln_final\.", "final_layer_norm."),
    (r"^transformer\.resblocks\.", "encoder.layers."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.attn\.in_proj_(weight|bias)$", r".self_attn.{}_proj.\1"),
    (r"\.attn\.out_proj\.", ".self_attn.out_proj."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)


def build_vit(config: Mapping[str, Any], *, where: str) -> VisionTransformer:
    """timm's ViT of a ViTConfig or ViTMAEConfig; its feature is the class token after the last norm.

    Raises:
        CheckpointError: a configuration that timm's module cannot follow.
    """
    told = {**_OF_VIT, **config}
    with followed(where, _BUILDABLE):
        _check_rgb(told, where)
        return VisionTransformer(
            img_size=_side(told, "image_size", where),
            patch_size=_side(told, "patch_size", where),
            num_classes=0,
            embed_dim=told["hidden_size"],
            depth=told["num_hidden_layers"],
            num_heads=told["num_attention_heads"],
            mlp_ratio=_mlp_ratio(told),
            qkv_bias=told["qkv_bias"],
            norm_layer=partial(LayerNorm, eps=told["layer_norm_eps"]),
            act_layer=get_act_layer(_activation(told, where)),
        )


def load_vit(vit: VisionTransformer, state: Mapping[str, Tensor], *, where: str) -> list[str]:
    """Loads a ViTModel, or the encoder of a model built on one. Returns what was left out, by the first of its name.

    Raises:
        CheckpointError: as `load_strictly`, in the names of the file.
    """
    prefix = "vit." if any(name.startswith("vit.") for name in state) else ""
    own = {prefix + name: tensor for name, tensor in _views(vit, _VIT_NAMES, ("query", "key", "value"))}
    beside = ("classifier.", "decoder.", f"{prefix}pooler.", f"{prefix}embeddings.mask_token")
    left_out = [name for name in state if name.startswith(beside)]
    _copy(own, {name: state[name] for name in state if name not in left_out}, where=where, of="this ViT")
    return sorted({name.removeprefix(prefix).split(".")[0].replace("embeddings", "mask_token") for name in left_out})


def build_clip(config: Mapping[str, Any], *, where: str) -> TwoTowers:
    """open_clip's towers of a CLIPConfig.

    Raises:
        InputError: a configuration that open_clip's modules cannot follow.
    """
    with followed(where, _BUILDABLE):
        both = build_open_clip(_clip_config(config, where), where=where)
    parts = TowerModules(both.visual, nn.Identity(), both.text)  # type: ignore[arg-type]
    return TwoTowers(parts, has_bias=False)


def load_clip(towers: TwoTowers, state: Mapping[str, Tensor], *, where: str) -> None:
    """Loads a CLIPModel; errors as in `load_vit`."""
    own = {
        **_clip_views(towers.encoder, "vision_model."),
        **_clip_views(towers.text, "text_model."),
        "logit_scale": towers.logit_scale.detach().reshape(()),
    }
    _copy(own, _without_positions(state), where=where, of="this CLIP")


def build_clip_image(config: Mapping[str, Any], *, projected: bool, where: str) -> nn.Module:
    """open_clip's image tower of a CLIPVisionConfig.

    Args:
        config: its entries.
        projected: as CLIPVisionModelWithProjection; else its feature is the class token after the last norm.
        where: for messages.
    """
    told = {**_OF_CLIP_IMAGE, **config}
    with followed(where, _BUILDABLE):
        cfg = CLIPVisionCfg(**_vision_config(told, where))
        tower: nn.Module = _build_vision_tower(told["projection_dim"], cfg, _is_quick(told, where))
    if not projected:
        tower.proj = None  # type: ignore[assignment]
    return tower


def load_clip_image(tower: nn.Module, state: Mapping[str, Tensor], *, where: str) -> None:
    """Loads a CLIPVisionModel, with or without projection; errors as in `load_vit`."""
    prefix = "vision_model." if any(name.startswith("vision_model.") for name in state) else ""
    _copy(_clip_views(tower, prefix), _without_positions(state), where=where, of="this image tower")


def _clip_config(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A CLIPConfig in the words of open_clip's model_configs."""
    vision = {**_OF_CLIP_IMAGE, **(config.get("vision_config_dict") or config.get("vision_config") or {})}
    text = {**_OF_CLIP_TEXT, **(config.get("text_config_dict") or config.get("text_config") or {})}
    quick = _is_quick(vision, where)
    if _is_quick(text, where) != quick:
        raise _unlike(where, "one activation of both towers", f"{vision['hidden_act']}, {text['hidden_act']}")
    if text["eos_token_id"] not in (_LEGACY_END, text["vocab_size"] - 1):
        raise _unlike(where, "the highest token for the end of a text", f"eos_token_id {text['eos_token_id']}")
    return {
        "embed_dim": config.get("projection_dim", 512),
        "quick_gelu": quick,
        "custom_text": True,
        "vision_cfg": _vision_config(vision, where),
        "text_cfg": {
            "context_length": text["max_position_embeddings"],
            "vocab_size": text["vocab_size"],
            "width": text["hidden_size"],
            "heads": text["num_attention_heads"],
            "layers": text["num_hidden_layers"],
            "mlp_ratio": _mlp_ratio(text),
            "norm_kwargs": {"eps": text["layer_norm_eps"]},
        },
    }


def _vision_config(told: Mapping[str, Any], where: str) -> dict[str, Any]:
    _check_rgb(told, where)
    return {
        "image_size": _side(told, "image_size", where),
        "patch_size": _side(told, "patch_size", where),
        "width": told["hidden_size"],
        "layers": told["num_hidden_layers"],
        "head_width": told["hidden_size"] // told["num_attention_heads"],
        "mlp_ratio": _mlp_ratio(told),
        "norm_kwargs": {"eps": told["layer_norm_eps"]},
    }


def _mlp_ratio(told: Mapping[str, Any]) -> float:
    """Both libraries take int(hidden * ratio), which rounding must not push below the width that is meant."""
    return float((told["intermediate_size"] + 0.5) / told["hidden_size"])


def _clip_views(tower: nn.Module, prefix: str) -> dict[str, Tensor]:
    """The projection, which open_clip keeps transposed in the tower, has a name of its own in transformers."""
    names = {"proj": "visual_projection.weight", "text_projection": "text_projection.weight"}
    return {
        names.get(name, prefix + name): tensor.T if name in names else tensor
        for name, tensor in _views(tower, _CLIP_NAMES, ("q", "k", "v"))
    }


def _views(module: nn.Module, names: Names, parts: tuple[str, str, str]) -> Iterable[tuple[str, Tensor]]:
    """The module's own tensors under other names; of queries, keys and values in one, each third."""
    for name, tensor in module.state_dict().items():
        for pattern, theirs in names:
            name = re.sub(pattern, theirs, name)
        if "{}" in name:
            yield from zip(map(name.format, parts), tensor.chunk(3), strict=True)
        else:
            yield name, tensor


def _copy(own: Mapping[str, Tensor], state: Mapping[str, Tensor], *, where: str, of: str) -> None:
    check_exactly(own, state, where=where, of=of)
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(state[name])


def _without_positions(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Old files keep the numbers 0, 1, ... of the positions."""
    return {name: tensor for name, tensor in state.items() if not name.endswith("embeddings.position_ids")}


def _activation(told: Mapping[str, Any], where: str) -> str:
    if told["hidden_act"] not in tuple(_ACTIVATIONS):  # a list has no hash to look up
        raise _unlike(where, f"hidden_act, one of {', '.join(_ACTIVATIONS)}", str(told["hidden_act"]))
    return _ACTIVATIONS[told["hidden_act"]]


def _is_quick(told: Mapping[str, Any], where: str) -> bool:
    if (activation := _activation(told, where)) not in ("gelu", "quick_gelu"):
        raise _unlike(where, "hidden_act gelu or quick_gelu", str(told["hidden_act"]))
    return activation == "quick_gelu"


def _side(told: Mapping[str, Any], key: str, where: str) -> int:
    size = told[key]
    if isinstance(size, list) and len(size) == 2 and size[0] == size[1]:
        return int(size[0])
    if not isinstance(size, int):
        raise _unlike(where, f"a square {key}", str(size))
    return size


def _check_rgb(told: Mapping[str, Any], where: str) -> None:
    if told["num_channels"] != 3:
        raise _unlike(where, "a model of RGB images", f"num_channels {told['num_channels']}")


def _unlike(where: str, expected: str, found: str) -> CheckpointError:
    return CheckpointError(where=where, expected=expected, found=found)
