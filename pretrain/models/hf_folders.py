"""A folder as Hugging Face's transformers writes it: its configuration, its weights, how its images are prepared."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from data_pipeline.durable import from_json
from data_pipeline.errors import CheckpointError, InputError
from data_pipeline.samples.preprocessing import Preprocessing
from pretrain.models.folders import CONFIG, PYTORCH, WEIGHTS
from pretrain.models.weights_files import read_shards, read_tensors

PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"
INDEX = f"{WEIGHTS}.index.json"

_FILTERS: dict[int, Literal["bilinear", "bicubic"]] = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers
# What transformers' processors do where their file does not say, by the beginning of their class's name.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "CLIP": {"resample": 3},
    "DeiT": {"resample": 3, "do_center_crop": True},
    "ViT": {"resample": 2},
}
_STEPS = {"do_resize", "do_rescale", "do_normalize", "do_center_crop"}
_HARMLESS = {"do_convert_rgb"}  # images are RGB here


def is_hf_folder(folder: Path) -> bool:
    """It has a config.json of transformers, not of timm."""
    try:
        told = from_json((folder / CONFIG).read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(told, dict) and "model_type" in told and "pretrained_cfg" not in told


@contextmanager
def followed(where: str, expected: str) -> Iterator[None]:
    """Whatever entries of a wrong kind raise on the way, as one error; those that name the entry pass as they are."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # constructors divide, multiply and look up with whatever a configuration says
        raise CheckpointError(where=where, expected=expected, found=f"{type(error).__name__}: {error}") from error


def read_config(folder: Path) -> dict[str, Any]:
    return _json(folder / CONFIG)


def read_weights(folder: Path) -> tuple[dict[str, Tensor], Path]:
    """All tensors by name, and the file that they come from.

    Raises:
        CheckpointError: no file, a damaged one, or a pickle of more than plain data.
    """
    if (path := folder / WEIGHTS).is_file() or (path := folder / PYTORCH).is_file():
        return read_tensors(path), path
    if (path := folder / INDEX).is_file():
        return read_shards(path), path
    raise CheckpointError(
        where=str(folder),
        expected=f"weights: {WEIGHTS}, {INDEX} or {PYTORCH}",
        found="none of them",
        fix="Save the model with save_pretrained, which writes safetensors.",
    )


def read_preprocessing(folder: Path) -> Preprocessing:
    """What the image processor says, which is resized as its torchvision variant does, antialiased in uint8.

    Raises:
        CheckpointError: it is missing, or cannot be done here: the message names the entry.
    """
    path = folder / PREPROCESSOR
    if not path.is_file() and (folder / PROCESSOR).is_file():
        path = folder / PROCESSOR
        told = _json(path).get("image_processor") or {}
    else:
        told = _json(path)
    with followed(str(path), "an image processor's entries"):
        return _preprocessing(told, path)


def _preprocessing(told: Mapping[str, Any], path: Path) -> Preprocessing:
    kind = _kind(told)
    told = {
        "do_center_crop": told.get("crop_size") is not None,
        "rescale_factor": 1 / 255,
        **next((entries for name, entries in _DEFAULTS.items() if kind.startswith(name)), {}),
        **told,
    }
    needed = ["size", "resample", "image_mean", "image_std", "rescale_factor"]
    for key in [*needed, "crop_size"] if told["do_center_crop"] else needed:
        if told.get(key) is None:
            raise _refused(path, key, "a value", "none")
    for key in ("do_resize", "do_rescale", "do_normalize"):
        if not told.get(key, True):
            raise _refused(path, key, "true", "false")
    if other := sorted(key for key in told.keys() - _STEPS - _HARMLESS if key.startswith("do_") and told[key]):
        raise _refused(path, other[0], "false, as evaluation views have no such step", "true")
    if not math.isclose(told["rescale_factor"], 1 / 255, rel_tol=1e-3):
        raise _refused(path, "rescale_factor", "1/255", told["rescale_factor"])
    if told["resample"] not in tuple(_FILTERS):  # a list has no hash to look up
        raise _refused(path, "resample", "2 (bilinear) or 3 (bicubic)", told["resample"])
    sides, resized = _resized(told, path)
    size = _square(told["crop_size"], "crop_size", path) if told["do_center_crop"] else resized
    if sides == "shorter" and not told["do_center_crop"]:
        raise _refused(path, "do_center_crop", "true, as only the shorter side is resized", "false")
    if size > resized:
        raise _refused(path, "crop_size", f"at most the resized {resized}", size)
    return Preprocessing(
        size,
        _channels(told, "image_mean", path),
        _channels(told, "image_std", path),
        interpolation=_FILTERS[told["resample"]],
        eval_crop=size / resized,
        eval_resize=sides,
    )


def _resized(told: Mapping[str, Any], path: Path) -> tuple[Literal["shorter", "square"], int]:
    """Returns which sides are resized, and to how many pixels."""
    size = told["size"]
    if isinstance(size, dict) and set(size) == {"shortest_edge"}:
        return "shorter", _pixels(size["shortest_edge"], "size", path)
    if isinstance(size, int):  # of old files, where it depends on the class
        kind = _kind(told)
        if kind.startswith("CLIP"):
            return "shorter", _pixels(size, "size", path)
        if not kind.startswith(("ViT", "DeiT")):
            raise _refused(path, "size", "height and width, or shortest_edge", f"{size} for a {kind}")
    return "square", _square(size, "size", path)


def _kind(told: Mapping[str, Any]) -> str:
    return str(told.get("image_processor_type") or told.get("feature_extractor_type"))


def _square(size: Any, key: str, path: Path) -> int:
    if isinstance(size, int):
        return _pixels(size, key, path)
    if isinstance(size, dict) and set(size) == {"height", "width"} and size["height"] == size["width"]:
        return _pixels(size["height"], key, path)
    raise _refused(path, key, "equal height and width", size)


def _pixels(size: Any, key: str, path: Path) -> int:
    if not isinstance(size, int) or size < 1:
        raise _refused(path, key, "a number of pixels", size)
    return size


def _channels(told: Mapping[str, Any], key: str, path: Path) -> tuple[float, float, float]:
    values = told[key]
    if not isinstance(values, list) or len(values) != 3 or not all(isinstance(v, int | float) for v in values):
        raise _refused(path, key, "three numbers", values)
    return float(values[0]), float(values[1]), float(values[2])


def _refused(path: Path, key: str, expected: str, found: object) -> CheckpointError:
    fix = f'Edit "{key}" in {path.name}, if you know how the model\'s images were prepared.'
    return CheckpointError(where=f"{path}: {key}", expected=expected, found=str(found), fix=fix)


def _json(path: Path) -> dict[str, Any]:
    try:
        told = from_json(path.read_text("utf-8"))
        if not isinstance(told, dict):
            raise ValueError(f"a {type(told).__name__}")
    except (OSError, ValueError) as error:
        raise CheckpointError(
            where=str(path),
            expected="a JSON object, as transformers writes it",
            found=f"{type(error).__name__}: {error}",
            fix="Save model and image processor into one folder, each with save_pretrained.",
        ) from error
    return told
