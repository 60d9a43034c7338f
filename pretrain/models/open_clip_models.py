"""Both towers of a CLIP as unmodified open_clip modules, built from a recipe or from open_clip's own configurations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from open_clip import get_model_config, list_models
from open_clip.model import CustomTextCLIP
from torch import nn

from data_pipeline.errors import InputError
from data_pipeline.messages import nearest
from pretrain.models.config import ImageTower, OpenClip, TextTower

TIMM_SIZE = "timm_model_name"  # of a vision_cfg, whose size is then that model's own


def build_open_clip(config: dict[str, Any], *, where: str = "model") -> nn.Module:
    """`visual`, `text`, `logit_scale`, `logit_bias`, initialized from torch's global seed; nothing is downloaded.

    Args:
        config: as in open_clip's model_configs, of towers that need no download (`checked_config`).
        where: where it stands, for messages.

    Raises:
        InputError: values that open_clip cannot build from.
    """
    arguments = {key: value for key, value in config.items() if key != "custom_text"}
    try:
        model: nn.Module = CustomTextCLIP(**arguments)
    except Exception as error:  # it asserts, divides and looks up with whatever the configuration says
        raise InputError(
            where=where,
            expected="values with which open_clip can build both towers",
            found=f"{type(error).__name__}: {error}",
        ) from error
    return model


def model_config(model: OpenClip) -> dict[str, Any]:
    """A recipe's towers in open_clip's words, as in its model_configs.

    Raises:
        InputError: an unknown name (the nearest known ones are given), or towers that cannot be trained here.
    """
    if model.image is not None and model.text is not None:
        return {
            "embed_dim": model.embed_dim,
            "custom_text": True,
            "vision_cfg": _image_config(model.image, model.image_size),
            "text_cfg": text_config(model.text),
        }
    config = named_config(model.name)
    vision, text = config["vision_cfg"], config["text_cfg"]
    own_size = vision.get("image_size", 224)
    if TIMM_SIZE in vision and model.image_size != own_size:
        raise InputError(
            where="model.image_size",
            expected=f"{own_size}, as {model.name} has timm's {vision[TIMM_SIZE]} in it",
            found=str(model.image_size),
        )
    vision["image_size"] = model.image_size
    for key in ("context_length", "vocab_size"):
        if getattr(model, key) is not None:
            text[key] = getattr(model, key)
    return config


def named_config(name: str) -> dict[str, Any]:
    """
    Raises:
        InputError: as `model_config`.
    """
    config: dict[str, Any] | None = get_model_config(name) if ":" not in name else None  # a scheme of open_clip's
    if config is None:
        raise InputError(
            where="model.name",
            expected="a name out of open_clip's model configurations, or embed_dim, image and text beside it",
            found=repr(name),
            fix=nearest(name, list_models(), cutoff=0.4),
        )
    return checked_config(config, where="model.name", name=name)


def checked_config(config: dict[str, Any], *, where: str, name: str) -> dict[str, Any]:
    """One of open_clip's configurations, with the text tower as a module of its own.

    Raises:
        InputError: it has a text tower out of a hub, or is no pair of towers.
    """
    problem = ""
    if "multimodal_cfg" in config:
        problem = "CoCa, which has a decoder of captions too"
    elif "hf_model_name" in config["text_cfg"]:
        problem = f"a text tower that has to be downloaded, {config['text_cfg']['hf_model_name']}"
    elif config["vision_cfg"].get("output_tokens") or config["text_cfg"].get("output_tokens"):
        problem = "towers that give tokens beside their features"
    if problem:
        raise InputError(where=where, expected="two towers of open_clip's own", found=f"{name}: {problem}")
    config["custom_text"] = True
    return config


def cleaning(text: Mapping[str, Any]) -> str:
    """What a configuration's `text_cfg` has done to a caption before its own tokenizer: `whitespace`, `lower` or
    `canonicalize`; or the further things that it asks of it, which are not known here.
    """
    asked = dict(text.get("tokenizer_kwargs") or {})
    clean = str(asked.pop("clean", "whitespace"))
    further = sorted([*asked, *(["tokenizer_mode"] if text.get("tokenizer_mode") else [])])
    return ", ".join(further) or clean


def text_config(text: TextTower) -> dict[str, Any]:
    return {
        "context_length": text.context_length,
        "vocab_size": text.vocab_size,
        "width": text.width,
        "heads": text.heads,
        "layers": text.layers,
        "mlp_ratio": text.mlp_ratio,
        "pool_type": text.pool,
        "no_causal_mask": not text.causal,
    }


def _image_config(image: ImageTower, image_size: int) -> dict[str, Any]:
    return {
        "image_size": image_size,
        "patch_size": image.patch_size,
        "width": image.width,
        "layers": image.layers,
        "head_width": image.width // image.heads,
        "mlp_ratio": image.mlp_ratio,
        "pool_type": image.pool,
    }
