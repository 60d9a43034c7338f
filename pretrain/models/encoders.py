"""Encoders are unmodified timm or open_clip modules, built from the group `model` of a recipe."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import timm
from timm.models.resnet import ResNet
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from data_pipeline.errors import InputError
from data_pipeline.messages import nearest
from pretrain.models import cifar_resnet  # noqa: F401  (names its models in timm's registry)
from pretrain.models.config import Model, ModelConfig

# Said elsewhere in the recipe, or the module would no longer take RGB images to features.
_RESERVED = {
    "num_classes",
    "in_chans",
    "img_size",
    "patch_size",
    "dynamic_img_size",
    "dynamic_img_pad",
    "strict_img_size",
    "block",
    "layers",
    "device",
    "dtype",
}

_FAMILIES: dict[str, type[nn.Module]] = {  # by timm's module; what takes a fixed image size, but for ResNets
    "vision_transformer": VisionTransformer,
    "deit": VisionTransformer,
    "swin_transformer": SwinTransformer,
    "swin_transformer_v2": SwinTransformerV2,
    "resnet": ResNet,
    "cifar_resnet": ResNet,  # ours
}


def build_encoder(model: ModelConfig) -> nn.Module:
    """An encoder initialized from torch's global seed; nothing is ever downloaded.

    Returns:
        A module from normalized images [B, 3, S, S] to features [B, D]: a timm ViT, Swin or ResNet without head, where
        D is its `head_hidden_size`, or the image tower of open_clip's model, which ends in a projection.

    Raises:
        InputError: an unknown name (the nearest known ones are given), options that timm refuses, or an image
            size that is not a multiple of the patch.
    """
    if not isinstance(model, Model):
        from pretrain.models.open_clip_models import build_open_clip, model_config  # seconds, for those who use it

        return build_open_clip(model_config(model)).visual  # type: ignore[return-value]
    args = model_args(model)
    try:
        encoder: nn.Module = timm.create_model(model.name, pretrained=False, **args)
    except Exception as error:  # timm asserts, divides and looks up with whatever the options say
        raise InputError(
            where="model.options",
            expected=f"values with which timm can build {model.name}",
            found=f"{model.options} ({type(error).__name__}: {error})",
        ) from error
    if has_patches(model.name):
        patch = max(encoder.patch_embed.patch_size)  # type: ignore[union-attr, arg-type]
        if model.image_size % patch:
            raise InputError(
                where="model.image_size",
                expected=f"a multiple of the patch size {patch}",
                found=str(model.image_size),
                fix=f"Nearest above: {-(-model.image_size // patch) * patch}.",
            )
    return encoder


def model_args(model: Model) -> dict[str, Any]:
    """The arguments with which `timm.create_model(model.name, **args)` builds the encoder of a recipe.

    Raises:
        InputError: an unknown name or option, or a patch size for a ResNet.
    """
    known = frozenset[str]().union(*map(_names, _FAMILIES))
    if model.name not in known:
        raise InputError(
            where="model.name",
            expected="the name of a timm ViT, Swin or ResNet",
            found=repr(model.name),
            fix=nearest(model.name.split(".")[0], known),  # a tag of weights names none,
        )
    accepted = set(inspect.signature(_family(model.name)).parameters) - _RESERVED
    for option in model.options:
        if option not in accepted:
            raise InputError(
                where=f"model.options.{option}",
                expected=f"an option of timm's {model.name}",
                found="none of that name",
                fix=nearest(option, accepted),
            )
    if model.options.get("global_pool") == "":
        raise InputError(where="model.options.global_pool", expected="a pooling, as features are [B, D]", found="none")
    args: dict[str, Any] = {"num_classes": 0, **model.options}
    if has_patches(model.name):
        if model.eval_size not in (None, model.image_size):
            raise InputError(
                where="model.eval_size",
                expected=f"none, as {model.name} is built for image_size {model.image_size} alone",
                found=str(model.eval_size),
                fix="Remove it.",
            )
        args |= {"img_size": model.image_size, "dynamic_img_size": False}
        if model.patch_size is not None:
            args["patch_size"] = model.patch_size
    elif model.patch_size is not None:
        raise InputError(
            where="model.patch_size",
            expected=f"none, as {model.name} has no patches",
            found=str(model.patch_size),
            fix="Remove it.",
        )
    return args


@functools.cache
def _names(timm_module: str) -> frozenset[str]:
    return frozenset(timm.list_models(module=timm_module))


def _family(name: str) -> type[nn.Module]:
    return next(family for module, family in _FAMILIES.items() if name in _names(module))


def has_patches(name: str) -> bool:
    """Whether a model cuts images into patches, and so takes images of one size only: all but ResNets do."""
    return _family(name) is not ResNet
