"""Two towers in a folder: as open_clip reads it (`local-dir:`), or as a timm folder with the rest in `towers/`."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.model import convert_to_custom_text_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from data_pipeline.batch import TokenSpec
from data_pipeline.durable import from_json
from data_pipeline.errors import CheckpointError
from data_pipeline.samples.preprocessing import Preprocessing, Resize
from pretrain.models.config import Model, ModelConfig, TextTower
from pretrain.models.encoder_folders import EncoderConfig, load_timm_encoder, save_encoder
from pretrain.models.folders import CONFIG, OPEN_CLIP_CONFIG, TOWERS, WEIGHTS, save_weights
from pretrain.models.foreign.fitting import without_ignored
from pretrain.models.open_clip_models import (
    build_open_clip,
    checked_config,
    cleaning,
    model_config,
    named_config,
    text_config,
)  # fmt: skip
from pretrain.models.strict_loading import load_strictly
from pretrain.models.tokenizers import CLIP, SAVED, SAVED_CONFIG
from pretrain.models.towers import SIGLIP_BIAS, TowerModules, TwoTowers, build_text
from pretrain.runtime.run_folder import sha256_of

SAME_FOLDER = "."  # where a saved tokenizer's files lie beside the weights
_RESIZE_MODES: dict[Resize, str] = {"shorter": "shortest", "square": "squash"}  # open_clip's words
_SCALARS = ("logit_scale", "logit_bias")  # of shape [1] here, as in the objective
_OPEN_CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", WEIGHTS)

Loaded = tuple[TwoTowers, EncoderConfig, TokenSpec]


def save_towers(
    folder: Path,
    state: Mapping[str, Tensor],
    model: ModelConfig,
    embed_dim: int | None,
    text: TextTower | None,
    tokenizer: str,
    preprocessing: Preprocessing,
) -> None:
    """Writes both towers.

    Those of open_clip so that `open_clip.create_model("local-dir:FOLDER")` gives them back. With a timm encoder the
    folder is timm's, and projection, text tower and scale lie in `towers/`.

    Args:
        folder: made if it is missing; files of an earlier save are replaced.
        state: whole logical tensors under the objective's names.
        model: as in the recipe, and embed_dim, text, tokenizer likewise.
        preprocessing: of evaluation views; images were normalized alike in training.
    """
    has_bias = "logit_bias" in state
    if isinstance(model, Model):
        assert text is not None
        rest = {name: tensor for name, tensor in state.items() if not name.startswith("encoder.")}
        encoder = {name.removeprefix("encoder."): state[name] for name in state if name not in rest}
        save_encoder(folder, encoder, model, preprocessing)
        (folder / TOWERS).mkdir(exist_ok=True)
        config = {
            "embed_dim": embed_dim,
            "text_cfg": text_config(text),
            "has_bias": has_bias,
            "tokenizer": _kept(tokenizer, folder / TOWERS),
            "encoder_sha256": sha256_of(folder / WEIGHTS),  # text and image of one and the same step
        }
        save_weights(folder / TOWERS / WEIGHTS, rest, folder / TOWERS / CONFIG, config)
        return
    towers = model_config(model)
    towers.pop("init_logit_bias", None)
    told = {
        "model_cfg": {**towers, "init_logit_bias": SIGLIP_BIAS} if has_bias else towers,
        "preprocess_cfg": {
            "mean": list(preprocessing.mean),
            "std": list(preprocessing.std),
            "interpolation": preprocessing.interpolation,
            "resize_mode": _RESIZE_MODES[preprocessing.eval_resize],
        },
        # Ours, which open_clip passes over.
        "name": model.name,
        "eval_crop": preprocessing.eval_crop,
    }
    folder.mkdir(parents=True, exist_ok=True)
    told["tokenizer"] = _kept(tokenizer, folder)
    renamed = {_to_open_clip(name): t.reshape(()) if name in _SCALARS else t for name, t in state.items()}
    save_weights(folder / _OPEN_CLIP_WEIGHTS[0], renamed, folder / OPEN_CLIP_CONFIG, told)


def _kept(tokenizer: str, folder: Path) -> str:
    """What a configuration says of its tokenizer; the files of a saved one are copied beside it, as they may move."""
    files = [Path(tokenizer) / name for name in (SAVED, SAVED_CONFIG)]
    if not files[0].is_file():
        return tokenizer
    for path in filter(Path.is_file, files):
        shutil.copyfile(path, folder / path.name)
    return SAME_FOLDER


def load_towers_folder(folder: Path, *, fresh: bool = False) -> Loaded:
    """Both towers of a folder, on the CPU.

    Args:
        folder: written by `save_towers`, or by open_clip.
        fresh: the same architecture, initialized from torch's global seed.

    Raises:
        CheckpointError: a file is missing or damaged, or the weights do not fit the architecture exactly.
        InputError: towers that cannot be built here.
    """
    if (folder / OPEN_CLIP_CONFIG).is_file():
        return load_open_clip(folder, fresh=fresh)
    if not (folder / TOWERS / CONFIG).is_file():
        raise CheckpointError(
            where=str(folder),
            expected=f"two towers: {OPEN_CLIP_CONFIG}, or {TOWERS}/{CONFIG} beside timm's {CONFIG}",
            found="neither",
            fix="Name a run of kind clip or siglip, or a folder that open_clip wrote.",
        )
    encoder, config = load_timm_encoder(folder)
    told = _json(folder / TOWERS / CONFIG)
    state = _weights(folder / TOWERS / WEIGHTS, told)
    if told.get("encoder_sha256") != config.file_sha256:
        raise CheckpointError(
            where=str(folder),
            expected=f"image and text tower of one save, {str(told.get('encoder_sha256'))[:12]}",
            found=f"an image tower {config.file_sha256[:12]}",
            fix="Its saving was interrupted: start the run again, which exports it.",
        )
    with _read(folder / TOWERS / CONFIG):
        width, dim = int(encoder.head_hidden_size), int(told["embed_dim"])  # type: ignore[arg-type]
        if fresh:
            encoder = config.build()
        parts = TowerModules(encoder, nn.Linear(width, dim, bias=False), build_text(dim, told["text_cfg"]))
        tokenizer = str(folder / TOWERS) if told["tokenizer"] == SAME_FOLDER else told["tokenizer"]
        spec = TokenSpec(tokenizer, parts.context_length, parts.vocab_size)
        towers = TwoTowers(parts, has_bias=told["has_bias"])
    if not fresh:
        whole = {**state, **{f"encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}}
        load_strictly(towers, whole, where=str(folder / TOWERS / WEIGHTS))
    return towers, config, spec


def load_open_clip(folder: Path, *, fresh: bool = False) -> Loaded:
    """Both towers of a folder with `open_clip_config.json`; errors as in `load_towers_folder`."""
    told = _json(folder / OPEN_CLIP_CONFIG)
    path = next((folder / name for name in _OPEN_CLIP_WEIGHTS if (folder / name).is_file()), None)
    if path is None:
        raise CheckpointError(
            where=str(folder), expected=f"weights, one of {', '.join(_OPEN_CLIP_WEIGHTS)}", found="none of them"
        )
    with _read(folder / OPEN_CLIP_CONFIG):
        hub = told["model_cfg"]["text_cfg"].get("hf_tokenizer_name")
        tokenizer = told.get("tokenizer", SAME_FOLDER if hub else CLIP)
        told["tokenizer"] = str(folder) if tokenizer == SAME_FOLDER else tokenizer
        told["weights_sha256"] = sha256_of(path)
    return _open_clip(told, None if fresh else _weights(path, told), where=str(path))[0]


def open_clip_by_name(
    name: str,
    state: dict[str, Tensor] | None,
    *,
    where: str,
    published: Mapping[str, Any] | None = None,
    ignore: Sequence[str] = (),
) -> tuple[Loaded, list[str]]:
    """Both towers of one of open_clip's configurations, with its own preprocessing; and the names that were ignored.

    Args:
        name: as in `open_clip.list_models()`.
        state: weights under open_clip's names; None: as initialized from torch's global seed.
        where: where they come from, for messages.
        published: what open_clip says of published weights, which have a preprocessing and an activation of their own.
        ignore: patterns of tensors that are left out where the towers do not need them.

    Raises:
        InputError: an unknown name, or towers that cannot be built here.
        CheckpointError: the weights do not fit exactly.
    """
    config = named_config(name)
    tokenizer = config["text_cfg"].get("hf_tokenizer_name", CLIP)
    told = {"name": name, "model_cfg": config, "tokenizer": tokenizer}
    if published is not None:
        config["quick_gelu"] = bool(published.get("quick_gelu", False))
        told["preprocess_cfg"] = {key: value for key, value in published.items() if value is not None}
    return _open_clip(told, state, where=where, ignore=ignore)


def _open_clip(
    told: dict[str, Any], state: dict[str, Tensor] | None, *, where: str, ignore: Sequence[str] = ()
) -> tuple[Loaded, list[str]]:
    """Builds towers as a configuration says; without a state they are fresh."""
    with _read(Path(where)):
        name = told.get("name", "open_clip")
        config = checked_config(deepcopy(told["model_cfg"]), where=where, name=name)
        pixels = told.get("preprocess_cfg", {})
        mode, size = pixels.get("resize_mode", "shortest"), config["vision_cfg"].get("image_size", 224)
        encoder_config = EncoderConfig(
            name=name,
            model_args=config,
            preprocessing=Preprocessing(
                image_size=size,
                mean=tuple(pixels.get("mean", OPENAI_DATASET_MEAN)),
                std=tuple(pixels.get("std", OPENAI_DATASET_STD)),
                interpolation=pixels.get("interpolation", "bicubic"),
                eval_crop=told.get("eval_crop", 1.0),
                eval_resize="square" if mode == _RESIZE_MODES["square"] else "shorter",
            ),
            file_sha256=told.get("weights_sha256", ""),
            library="open_clip",
        )
    if mode not in _RESIZE_MODES.values() or not isinstance(size, int):
        raise CheckpointError(
            where=where,
            expected="square images, resized by their shorter side and cropped, or by both sides",
            found=f"resize_mode {mode}, image_size {size}",
        )
    both = build_open_clip(config, where=where)
    parts = TowerModules(both.visual, nn.Identity(), both.text)  # type: ignore[arg-type]
    spec = TokenSpec(told["tokenizer"], parts.context_length, parts.vocab_size, cleaning(config["text_cfg"]))
    if state is None:
        return (TwoTowers(parts, has_bias="init_logit_bias" in config), encoder_config, spec), []
    if "positional_embedding" in state:  # the text tower's parts at the top, as in CLIP's own weights
        state = convert_to_custom_text_state_dict(state)
    towers = TwoTowers(parts, has_bias="logit_bias" in state)
    needed = list(map(_to_open_clip, towers.state_dict()))
    state, ignored = without_ignored(state, needed, ignore, option="--weights-ignore", where=where)
    renamed = {_from_open_clip(name): t.reshape(1) if name in _SCALARS else t for name, t in state.items()}
    load_strictly(towers, renamed, where=where)
    return (towers, encoder_config, spec), ignored


def objective_weights(folder: Path) -> dict[str, Tensor]:
    """All weights of an exported folder of two towers under the names that an objective has for them."""
    return dict(load_towers_folder(folder)[0].state_dict())


def _to_open_clip(name: str) -> str:
    return f"visual.{name.removeprefix('encoder.')}" if name.startswith("encoder.") else name


def _from_open_clip(name: str) -> str:
    return f"encoder.{name.removeprefix('visual.')}" if name.startswith("visual.") else name


def _json(path: Path) -> dict[str, Any]:
    with _read(path):
        told: dict[str, Any] = from_json(path.read_text(encoding="utf-8"))
        return told


def _weights(path: Path, told: Mapping[str, Any]) -> dict[str, Tensor]:
    with _read(path):
        digest = sha256_of(path)
        state: dict[str, Tensor] = load_file(path)
    if told.get("file_sha256", digest) != digest:
        raise CheckpointError(
            where=str(path),
            expected=f"sha256 {told['file_sha256'][:12]} as its configuration says",
            found=digest[:12],
            fix="It was damaged, or its saving was interrupted: export it again.",
        )
    return state


@contextmanager
def _read(path: Path) -> Iterator[None]:
    """What a file that cannot be used raises, as one error."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise CheckpointError(
            where=str(path), expected="a file of two towers, as open_clip or this program writes it",
            found=f"{type(error).__name__}: {error}",
        ) from error  # fmt: skip
