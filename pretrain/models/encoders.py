"""Encoders are unmodified timm modules: built from a recipe, saved and loaded in timm's own folder layout."""

from __future__ import annotations

import difflib
import functools
import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from timm.models.resnet import ResNet
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from data_pipeline.errors import CheckpointError, InputError
from pretrain.models import cifar_resnet  # noqa: F401  (names its models in timm's registry)
from pretrain.models.config import Model, ModelConfig
from pretrain.models.folders import save_weights
from pretrain.models.weights_files import read_tensors
from pretrain.recipe.recipe import Views
from pretrain.runtime.run_folder import sha256_of

WEIGHTS, CONFIG = "model.safetensors", "config.json"
PYTORCH = "pytorch_model.bin"  # which timm's and transformers' older savers write
OPEN_CLIP_CONFIG = "open_clip_config.json"
TOWERS = "towers"  # a folder beside timm's files, with the text tower and what else timm knows nothing of

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

_CROP_MODES: dict[str, Literal["shorter", "square"]] = {"center": "shorter", "squash": "square"}  # timm's words


@dataclass(frozen=True)
class EncoderConfig:
    """What an encoder folder says beside its weights.

    Attributes:
        name: timm's name of the architecture, or that of open_clip's towers.
        model_args: arguments with which `timm.create_model(name, **model_args)` builds it; open_clip's `model_cfg`.
        image_size: side of the square images it is judged on, pixels.
        mean: per channel, of images scaled to [0, 1].
        std: per channel, of images scaled to [0, 1].
        interpolation: of the resize before the centre crop.
        eval_crop: side of the centre crop, as a share of the resized shorter side.
        file_sha256: hex digest of the weights file.
        eval_resize: of which sides, as in `ViewSpec`.
    """

    name: str
    model_args: Mapping[str, Any]
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str
    eval_crop: float
    file_sha256: str
    library: Literal["timm", "open_clip"] = "timm"
    eval_resize: Literal["shorter", "square"] = "shorter"

    def build(self) -> nn.Module:
        """The same architecture, initialised from torch's global seed."""
        if self.library == "open_clip":
            from pretrain.models.open_clip_models import build_open_clip

            return build_open_clip(dict(self.model_args)).visual  # type: ignore[return-value]
        encoder: nn.Module = timm.create_model(self.name, pretrained=False, **self.model_args)
        return encoder


def build_encoder(model: ModelConfig) -> nn.Module:
    """An encoder initialised from torch's global seed; nothing is ever downloaded.

    Returns:
        A module from normalised images [B, 3, S, S] to features [B, D]: a timm ViT, Swin or ResNet without head, where
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
    if _has_patches(model.name):
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
            fix=_nearest(model.name, known),
        )
    accepted = set(inspect.signature(_family(model.name)).parameters) - _RESERVED
    for option in model.options:
        if option not in accepted:
            raise InputError(
                where=f"model.options.{option}",
                expected=f"an option of timm's {model.name}",
                found="none of that name",
                fix=_nearest(option, accepted),
            )
    if model.options.get("global_pool") == "":
        raise InputError(where="model.options.global_pool", expected="a pooling, as features are [B, D]", found="none")
    args: dict[str, Any] = {"num_classes": 0, **model.options}
    if _has_patches(model.name):
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


def save_encoder(
    folder: Path,
    state: Mapping[str, Tensor],
    model: Model,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    views: Views,
) -> None:
    """Writes an encoder so that `timm.create_model("local-dir:FOLDER", pretrained=True)` gives it back.

    Each file appears whole or not at all, and the config carries the hash of the weights, so that an
    interrupted save is never taken for an encoder.

    Args:
        folder: made if it is missing; files of an earlier save are replaced.
        state: whole logical tensors under the encoder's own names.
        model: the group of the recipe that the encoder was built from.
        mean: per channel, with which images were normalised in training.
        std: per channel, likewise.
        views: the geometry of evaluation views is taken from it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architecture": model.name,
        "num_classes": 0,
        "model_args": model_args(model),
        "pretrained_cfg": {
            "input_size": [3, model.judged_size, model.judged_size],
            "fixed_input_size": _has_patches(model.name),
            "interpolation": views.interpolation,
            "crop_pct": views.eval_crop,
            "crop_mode": "center",
            "mean": list(mean),
            "std": list(std),
            "num_classes": 0,
            "pool_size": None,
            # With these timm can put a new head, or another number of channels, on the loaded weights.
            "first_conv": timm.models.get_pretrained_cfg_value(model.name, "first_conv"),
            "classifier": timm.models.get_pretrained_cfg_value(model.name, "classifier"),
        },
    }
    save_weights(folder / WEIGHTS, state, folder / CONFIG, config)


def load_encoder(folder: Path) -> tuple[nn.Module, EncoderConfig]:
    """The encoder of a folder as `save_encoder`, timm (without a head) or open_clip writes it, on the CPU.

    Raises:
        CheckpointError: a file is missing or damaged, or the weights do not fit the architecture exactly.
    """
    if (folder / OPEN_CLIP_CONFIG).is_file():
        from pretrain.models.tower_folders import load_open_clip

        module, config, _ = load_open_clip(folder)
        return module.encoder, config
    weights = next((path for path in (folder / WEIGHTS, folder / PYTORCH) if path.is_file()), folder / WEIGHTS)
    try:
        raw = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        preprocessing, digest = raw["pretrained_cfg"], sha256_of(weights)
        config = EncoderConfig(
            name=raw["architecture"],
            model_args=raw.get("model_args", {"num_classes": raw["num_classes"]}),
            image_size=preprocessing["input_size"][-1],
            mean=tuple(preprocessing["mean"]),
            std=tuple(preprocessing["std"]),
            interpolation=preprocessing["interpolation"],
            eval_crop=preprocessing["crop_pct"],
            file_sha256=digest,
            eval_resize=_CROP_MODES[preprocessing.get("crop_mode", "center")],
        )
        state = read_tensors(weights)
        encoder = config.build()
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, AssertionError) as error:
        raise CheckpointError(
            where=str(folder),
            expected=f"an encoder: {CONFIG} and {WEIGHTS} or {PYTORCH} as timm writes them",
            found=f"{type(error).__name__}: {error}",
        ) from error
    if raw.get("file_sha256", digest) != digest:
        raise CheckpointError(
            where=str(weights),
            expected=f"sha256 {raw['file_sha256'][:12]} as {CONFIG} says",
            found=digest[:12],
            fix="It was damaged, or its saving was interrupted: export the encoder again.",
        )
    load_strictly(encoder, state, where=str(weights))
    return encoder, config


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], *, where: str) -> None:
    """Loads all of `state` into all of `module`, or refuses and changes nothing.

    Raises:
        CheckpointError: names or shapes differ, or a value is not finite; the message lists the names.
    """
    check_exactly(module.state_dict(), state, where=where, of=type(module).__name__)
    module.load_state_dict(state)


def check_exactly(own: Mapping[str, Tensor], state: Mapping[str, Tensor], *, where: str, of: str) -> None:
    """`state` has exactly the names and shapes of `own`, and is finite; errors as in `load_strictly`."""
    both = own.keys() & state.keys()
    faults = {
        "missing": own.keys() - state.keys(),
        "unexpected": state.keys() - own.keys(),
        "of another shape": {name for name in both if own[name].shape != state[name].shape},
        "not finite": {name for name in both if not torch.isfinite(state[name]).all()},
    }
    told = [f"{len(names)} {fault}: {_some(names)}" for fault, names in faults.items() if names]
    if told:
        raise CheckpointError(
            where=where,
            expected=f"exactly the {len(own)} tensors of {of}, all finite",
            found="; ".join(told),
            fix="Name the weights that were saved from this very architecture.",
        )


@functools.cache
def _names(timm_module: str) -> frozenset[str]:
    return frozenset(timm.list_models(module=timm_module))


def _family(name: str) -> type[nn.Module]:
    return next(family for module, family in _FAMILIES.items() if name in _names(module))


def _has_patches(name: str) -> bool:
    return _family(name) is not ResNet


def _nearest(name: str, known: frozenset[str] | set[str]) -> str:
    near = difflib.get_close_matches(name.split(".")[0], known, n=3, cutoff=0.5)
    return f"Nearest: {', '.join(near)}." if near else ""


def _some(names: set[str], shown: int = 8) -> str:
    rest = len(names) - shown
    return ", ".join(sorted(names)[:shown]) + (f" and {rest} more" if rest > 0 else "")
