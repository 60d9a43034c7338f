"""An encoder in a folder as timm reads and writes it: `timm.create_model("local-dir:FOLDER", pretrained=True)`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import timm
from torch import Tensor, nn

from data_pipeline.durable import from_json
from data_pipeline.errors import CheckpointError
from data_pipeline.samples.preprocessing import Preprocessing, Resize
from pretrain.models.config import Model
from pretrain.models.encoders import has_patches, model_args
from pretrain.models.folders import CONFIG, PYTORCH, WEIGHTS, save_weights
from pretrain.models.strict_loading import load_strictly
from pretrain.models.weights_files import read_tensors
from pretrain.runtime.run_folder import sha256_of

CROP_MODES: dict[Resize, str] = {"shorter": "center", "square": "squash"}  # timm's words
_RESIZES = {mode: resize for resize, mode in CROP_MODES.items()}


@dataclass(frozen=True)
class EncoderConfig:
    """What an encoder folder says beside its weights.

    Attributes:
        name: timm's name of the architecture, or that of open_clip's towers.
        model_args: arguments with which `timm.create_model(name, **model_args)` builds it; open_clip's `model_cfg`.
        preprocessing: how images become its input where it is judged.
        file_sha256: hex digest of the weights file.
        library: whose architecture it is.
    """

    name: str
    model_args: Mapping[str, Any]
    preprocessing: Preprocessing
    file_sha256: str
    library: Literal["timm", "open_clip"] = "timm"

    def build(self) -> nn.Module:
        """The same architecture, initialized from torch's global seed."""
        if self.library == "open_clip":
            from pretrain.models.open_clip_models import build_open_clip

            return build_open_clip(dict(self.model_args)).visual  # type: ignore[return-value]
        encoder: nn.Module = timm.create_model(self.name, pretrained=False, **self.model_args)
        return encoder


def save_encoder(
    folder: Path,
    state: Mapping[str, Tensor],
    model: Model,
    preprocessing: Preprocessing,
) -> None:
    """Writes an encoder so that `timm.create_model("local-dir:FOLDER", pretrained=True)` gives it back.

    Each file appears whole or not at all, and the config carries the hash of the weights, so that an
    interrupted save is never taken for an encoder.

    Args:
        folder: made if it is missing; files of an earlier save are replaced.
        state: whole logical tensors under the encoder's own names.
        model: the group of the recipe that the encoder was built from.
        preprocessing: of evaluation views; images were normalized alike in training.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architecture": model.name,
        "num_classes": 0,
        "model_args": model_args(model),
        "pretrained_cfg": {
            "input_size": [3, preprocessing.image_size, preprocessing.image_size],
            "fixed_input_size": has_patches(model.name),
            "interpolation": preprocessing.interpolation,
            "crop_pct": preprocessing.eval_crop,
            "crop_mode": CROP_MODES[preprocessing.eval_resize],
            "mean": list(preprocessing.mean),
            "std": list(preprocessing.std),
            "num_classes": 0,
            "pool_size": None,
            # With these timm can put a new head, or another number of channels, on the loaded weights.
            "first_conv": timm.models.get_pretrained_cfg_value(model.name, "first_conv"),
            "classifier": timm.models.get_pretrained_cfg_value(model.name, "classifier"),
        },
    }
    save_weights(folder / WEIGHTS, state, folder / CONFIG, config)


def load_timm_encoder(folder: Path) -> tuple[nn.Module, EncoderConfig]:
    """The encoder of a folder as `save_encoder` or timm (without a head) writes it, on the CPU.

    Raises:
        CheckpointError: a file is missing or damaged, or the weights do not fit the architecture exactly.
    """
    weights = next((path for path in (folder / WEIGHTS, folder / PYTORCH) if path.is_file()), folder / WEIGHTS)
    try:
        raw = from_json((folder / CONFIG).read_text(encoding="utf-8"))
        pixels, digest = raw["pretrained_cfg"], sha256_of(weights)
        config = EncoderConfig(
            name=raw["architecture"],
            model_args=raw.get("model_args", {"num_classes": raw["num_classes"]}),
            preprocessing=Preprocessing(
                image_size=pixels["input_size"][-1],
                mean=tuple(pixels["mean"]),
                std=tuple(pixels["std"]),
                interpolation=pixels["interpolation"],
                eval_crop=pixels["crop_pct"],
                eval_resize=_RESIZES[pixels.get("crop_mode", "center")],
            ),
            file_sha256=digest,
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
