"""Encoders and towers out of a folder of Hugging Face's transformers, which itself is not needed."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from timm.models.vision_transformer import VisionTransformer
from torch import nn

from data_pipeline.batch import TokenSpec
from data_pipeline.durable import from_json
from data_pipeline.errors import CheckpointError
from data_pipeline.samples.preprocessing import Preprocessing
from pretrain.evals.encoder import Encoder
from pretrain.models import hf_models
from pretrain.models.folders import CONFIG
from pretrain.models.hf_folders import PREPROCESSOR, read_config, read_preprocessing, read_weights
from pretrain.models.seeded import seeded
from pretrain.models.tokenizers import CLIP, ClipTokenizer
from pretrain.models.towers import TwoTowers

_ENDS = {"<|startoftext|>": "<start_of_text>", "<|endoftext|>": "<end_of_text>"}  # open_clip's words for them


def hf_encoder(folder: Path, *, random_init: bool, seed: int, image_size: int | None = None) -> Encoder:
    """The image encoder of a folder (config.json, weights, preprocessor_config.json), at the size it was made for.

    Args:
        folder: of a ViT or ViTMAE, whose feature is the class token; or of a CLIP or its image tower, whose feature
            is its image embedding, before normalisation.
        random_init: the same architecture with fresh weights.
        seed: of the fresh weights.
        image_size: at which it is going to be judged; None: its own, which the preprocessing must give then.

    Raises:
        InputError: a model or a preprocessing that cannot be had here, damaged weights, or not exactly its own.
    """
    config = read_config(folder)
    preprocessing = read_preprocessing(folder)
    description = _description(folder, config)
    kind = config.get("model_type")
    module: nn.Module
    if kind in hf_models.VIT:
        module = vit = seeded(seed, lambda: hf_models.build_vit(config, where=str(folder / CONFIG)))
        if not random_init:
            state, path = read_weights(folder)
            description["left_out"] = hf_models.load_vit(vit, state, where=str(path))
    elif kind == hf_models.CLIP:
        module = _clip(folder, config, random_init, seed).encoder
    elif kind == hf_models.CLIP_IMAGE:
        module = _clip_image(folder, config, random_init, seed)
    else:
        raise _unknown(folder, kind, [*hf_models.VIT, hf_models.CLIP, hf_models.CLIP_IMAGE])
    if image_size is None:
        _check_size(folder, preprocessing, _size(module))
    return _encoder(module, preprocessing, description, seed if random_init else None)


def hf_towers(
    folder: Path, *, random_init: bool, seed: int, tokenizer: str | None, image_size: int | None = None
) -> tuple[TwoTowers, Encoder, TokenSpec]:
    """Both towers of a CLIPModel, the image tower with its preprocessing, and tokens; errors as in `hf_encoder`.

    Args:
        folder: with the tokenizer's files too.
        random_init, seed: as in `hf_encoder`.
        tokenizer: one that stands in for that of the folder; None: its own, which must be CLIP's.
        image_size: as in `hf_encoder`.
    """
    config = read_config(folder)
    if config.get("model_type") != hf_models.CLIP:
        raise _unknown(folder, config.get("model_type"), [hf_models.CLIP])
    preprocessing = read_preprocessing(folder)
    towers = _clip(folder, config, random_init, seed)
    if image_size is None:
        _check_size(folder, preprocessing, _size(towers.encoder))
    length = towers.parts.context_length
    spec = TokenSpec(tokenizer or _tokenizer(folder, length), length, towers.parts.vocab_size)
    init_seed = seed if random_init else None
    return towers, _encoder(towers.encoder, preprocessing, _description(folder, config), init_seed), spec


def _encoder(
    module: nn.Module, preprocessing: Preprocessing, description: dict[str, object], init_seed: int | None
) -> Encoder:
    return Encoder(
        module,
        replace(preprocessing, image_size=_size(module)),
        tag="encoder" if init_seed is None else "random",
        description=description if init_seed is None else {**description, "init_seed": init_seed},
    )


def _clip(folder: Path, config: dict[str, Any], random_init: bool, seed: int) -> TwoTowers:
    towers = seeded(seed, lambda: hf_models.build_clip(config, where=str(folder / CONFIG)))
    if not random_init:
        state, path = read_weights(folder)
        hf_models.load_clip(towers, state, where=str(path))
    return towers


def _clip_image(folder: Path, config: dict[str, Any], random_init: bool, seed: int) -> nn.Module:
    projected = "CLIPVisionModelWithProjection" in _architectures(config)
    where = str(folder / CONFIG)
    tower = seeded(seed, lambda: hf_models.build_clip_image(config, projected=projected, where=where))
    if not random_init:
        state, path = read_weights(folder)
        hf_models.load_clip_image(tower, state, where=str(path))
    return tower


def _description(folder: Path, config: dict[str, Any]) -> dict[str, object]:
    name = [*_architectures(config), config.get("model_type")][0]
    return {"source": str(folder), "kind": "Hugging Face folder", "architecture": name}


def _architectures(config: dict[str, Any]) -> list[Any]:
    """The classes that wrote it; a configuration need not name any."""
    told = config.get("architectures")
    return told if isinstance(told, list) else []


def _size(module: Any) -> int:
    (size, _) = module.patch_embed.img_size if isinstance(module, VisionTransformer) else module.image_size
    return int(size)


def _check_size(folder: Path, preprocessing: Preprocessing, size: int) -> None:
    if preprocessing.image_size != size:
        raise CheckpointError(
            where=str(folder / PREPROCESSOR),
            expected=f"images of {size} x {size}, as {CONFIG} has the model",
            found=f"{preprocessing.image_size} x {preprocessing.image_size}",
            fix="Say at which size to judge it with --image-size.",
        )


def _tokenizer(folder: Path, context_length: int) -> str:
    """The name of CLIP's, if the files in the folder are of that one."""
    try:
        if (path := folder / "vocab.json").is_file():
            vocabulary = from_json(path.read_text("utf-8"))
        else:
            path = folder / "tokenizer.json"
            vocabulary = from_json(path.read_text("utf-8"))["model"]["vocab"]
        words = sorted(vocabulary, key=vocabulary.__getitem__)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            where=str(folder),
            expected="the tokenizer's vocab.json or tokenizer.json",
            found=f"{type(error).__name__}: {error}",
            fix="If the towers were trained with CLIP's tokenizer, say so with --tokenizer clip.",
        ) from error
    digest = hashlib.sha256("\n".join(_ENDS.get(word, word) for word in words).encode()).hexdigest()
    if digest != ClipTokenizer(context_length).fingerprint:
        raise CheckpointError(
            where=str(path),
            expected="the vocabulary of CLIP's tokenizer",
            found=f"another one, of {len(words)} tokens",
            fix="Name a local file of its merges, in CLIP's form, with --tokenizer.",
        )
    return CLIP


def _unknown(folder: Path, kind: object, known: list[str]) -> CheckpointError:
    return CheckpointError(
        where=str(folder / CONFIG),
        expected=f"model_type {' or '.join(known)}",
        found=str(kind),
        fix="Export the encoder to timm's or open_clip's folder layout.",
    )
