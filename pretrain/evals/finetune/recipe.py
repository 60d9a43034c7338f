"""The recipe that fine-tunes an encoder: supervised training by this project's own trainer, from a preset."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data_pipeline.errors import CheckpointError, InputError, RecipeError
from pretrain.evals.encoder import Encoder
from pretrain.evals.features.extract import full_precision, untouched
from pretrain.evals.finetune.config import FinetuneConfig, PresetName
from pretrain.models.config import Model
from pretrain.models.encoders import build_encoder
from pretrain.models.load_encoder import load_encoder
from pretrain.models.seeded import seeded
from pretrain.models.strict_loading import load_strictly
from pretrain.recipe.files import load_recipe, make_recipe, merge
from pretrain.recipe.recipe import Recipe
from pretrain.recipe.typed import as_tuples
from pretrain.runtime.native_precision import Precision, native_precision

PRESETS: dict[PresetName, dict[str, Any]] = {
    # For data sets of some thousands to some hundred thousand images.
    "small": {
        "data": {"augment": [{"rand_augment": {}}]},
        "model": {"options": {"drop_path_rate": 0.1}},
        "objective": {"label_smoothing": 0.1},
        "optim": {"base_lr": 5e-4, "betas": [0.9, 0.999], "weight_decay": 0.05, "layer_decay": 0.75, "clip_norm": 1.0},
        "schedule": {"epochs": 20, "warmup": 0.1},
        "batch": {"global_size": 128},
        "ema": {"decay": 0.999},
    },
    # He et al. 2021 (arXiv:2111.06377), table 9, for ViT-B, where text and code differ as the code has it (layer decay
    # 0.65; learning rate 5e-4 for 256 images, falling to 1e-6; head at 2e-5, norm of the mean of patches). For larger
    # ones: MAE_BY_SIZE. RandAugment's geometry is bilinear, theirs bicubic.
    "mae": {
        "data": {
            "views": {"scale": [0.08, 1.0], "interpolation": "bicubic", "eval_crop": 0.875},
            "augment": [
                {
                    "rand_augment": {"num_ops": 2, "magnitude": 9.0, "magnitude_std": 0.5},
                    "erasing": {"probability": 0.25},
                }
            ],
            "mixing": {"mixup": 0.8, "cutmix": 1.0},
        },
        "model": {"options": {"drop_path_rate": 0.1, "global_pool": "avg", "fc_norm": True}},
        "objective": {"label_smoothing": 0.1, "classifier_init": 2e-5},
        "optim": {"base_lr": 5e-4, "lr_batch": 256, "betas": [0.9, 0.999], "weight_decay": 0.05, "layer_decay": 0.65},
        "schedule": {"epochs": 100, "warmup": 0.05, "final_lr": 5e-4},
        "batch": {"global_size": 1024},
    },
}

# What MAE's authors (FINETUNE.md of their code) have otherwise for larger models than ViT-B, by a part of timm's names;
# warmup is 5 epochs of any of them, and the learning rate falls to 1e-6.
_LARGE: dict[str, Any] = {
    "optim": {"base_lr": 1e-3, "layer_decay": 0.75},
    "schedule": {"epochs": 50, "warmup": 0.1, "final_lr": 2.5e-4},
}
MAE_BY_SIZE: dict[str, dict[str, Any]] = {
    "_large_": {**_LARGE, "model": {"options": {"drop_path_rate": 0.2}}},
    "_huge_": {**_LARGE, "model": {"options": {"drop_path_rate": 0.3}}},
}


def preset_for(name: PresetName, model_name: str) -> dict[str, Any]:
    """A preset as it is for a model of timm's: MAE's depends on its size; smaller ones than ViT-B take that one's."""
    preset = deepcopy(PRESETS[name])
    for part, changes in MAE_BY_SIZE.items() if name == "mae" else ():
        if part in model_name:
            preset = merge(preset, deepcopy(changes))
    return preset


def finetune_recipe(encoder: Encoder, config: FinetuneConfig, *, num_classes: int, start: Path) -> Recipe:
    """The recipe of a fine-tuning.

    Args:
        encoder: what is fine-tuned; the recipe has its preprocessing, where the preset says no other.
        config: the preset, and what is changed of it.
        num_classes: K.
        start: folder of the encoder that training starts from.

    Raises:
        InputError: an encoder that recipes cannot train, or a wrong override.
    """
    model = finetuned_model(encoder)
    preset = preset_for(config.preset, model.name)
    wanted: Mapping[str, Any] = preset["model"]["options"]
    if "fc_norm" in wanted and not model.name.startswith(("vit_", "deit_")):
        raise InputError(
            where=f"--paper {config.preset}", expected="a ViT, as the paper's", found=model.name,
            fix="Leave --paper out, and set what you need with --set.",
        )  # fmt: skip
    own = encoder.preprocessing
    views = {"interpolation": own.interpolation, "eval_crop": own.eval_crop}
    schedule = {**preset["schedule"], **({"epochs": config.epochs} if config.epochs is not None else {})}
    tree: dict[str, Any] = {
        "name": "finetune-run",
        "seed": config.seed,
        "data": {
            "train": config.train,
            "mean": list(own.mean),
            "std": list(own.std),
            **preset["data"],
            "views": {**views, **preset["data"].get("views", {})},
        },
        "model": {**model.model_dump(), "options": {**model.options, **wanted}},
        "objective": {"kind": "supervised", "num_classes": num_classes, **preset["objective"]},
        "optim": preset["optim"],
        "schedule": schedule,
        "batch": {"global_size": config.batch_size or preset["batch"]["global_size"]},
        "ema": preset.get("ema"),
        "init_from": str(start),
        "engine": {"precision": config.precision or usual_precision(config.device)},
        "runtime": {"device": config.device, "num_workers": config.num_workers},
    }
    recipe = make_recipe(tree, list(config.overrides), where="the fine-tuning's recipe")
    said = {
        "data.train": (recipe.data.train, config.train),
        "init_from": (recipe.init_from, str(start)),
        "resume_from": (recipe.resume_from, None),
        "objective.kind": (recipe.objective.kind, "supervised"),
        "objective.num_classes": (getattr(recipe.objective, "num_classes", num_classes), num_classes),
    }
    problems = [
        f"{key}: expected {wanted!r}, as the data and the encoder say, found {found!r}."
        for key, (found, wanted) in said.items()
        if found != wanted
    ]
    if problems:
        raise RecipeError("the fine-tuning's recipe", problems)
    return recipe


def usual_precision(device: str) -> Precision:
    """The precision of a training that is not told one: on a GPU what it has instructions for, on a CPU fp32."""
    on_gpu = device != "cpu" and torch.cuda.is_available()
    return native_precision(torch.device("cuda")) if on_gpu else "fp32"


def finetuned_model(encoder: Encoder) -> Model:
    """The `model` group of a recipe that builds this encoder; that it gives the same features is tried.

    Raises:
        InputError: recipes cannot build it.
    """
    model = _said(encoder)
    if not isinstance(model, Model):
        raise InputError(
            where=str(encoder.description.get("source", "encoder")),
            expected="a timm ViT, Swin or ResNet, which the trainer can train with a classifier",
            found=str(encoder.description.get("architecture", type(encoder.module).__name__)),
        )
    with torch.device("meta"):
        build_encoder(model)  # its errors first
    rebuilt = seeded(0, lambda: build_encoder(model)).to(encoder.device)
    load_strictly(rebuilt, encoder.module.state_dict(), where=str(encoder.description.get("source", "encoder")))
    size = encoder.preprocessing.image_size
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0)).to(encoder.device)
    with untouched(encoder.module), untouched(rebuilt), full_precision():
        expected, found = encoder.module(images), rebuilt(images)
    if found.shape != expected.shape or not torch.allclose(found, expected, rtol=1e-3, atol=1e-4):
        raise CheckpointError(
            where=str(encoder.description.get("source", "encoder")),
            expected=f"the same features from a {model.name} that a recipe builds",
            found="others, with the same weights",
            fix="Save it with all arguments that timm needs to build it.",
        )
    return model


def _said(encoder: Encoder) -> object:
    """What its source says of its architecture; whether that is so is found out by building it."""
    said, size = encoder.description, encoder.preprocessing.image_size
    if said.get("kind") in ("run", "checkpoint") and encoder.run is not None:
        model = load_recipe(encoder.run / "recipe.yaml").model
        other = isinstance(model, Model) and model.judged_size != size
        # Asked for another size, it is both trained and judged at that.
        return model.model_copy(update={"image_size": size, "eval_size": None} if other else {})
    if said.get("kind") == "encoder folder":
        _, config = load_encoder(Path(str(said["source"])))
        return (
            _model(config.name, config.model_args, encoder.preprocessing.image_size)
            if config.library == "timm"
            else None
        )
    options = said.get("options", {})
    if said.get("kind") in ("timm", "weights file") and isinstance(options, Mapping):
        return _model(str(said["architecture"]), options, size)
    return None


def _model(name: str, arguments: Mapping[str, Any], image_size: int) -> Model:
    """From timm's arguments; what a recipe says elsewhere is taken out of them."""
    options = {k: v for k, v in arguments.items() if k not in ("num_classes", "img_size", "dynamic_img_size")}
    patch = options.pop("patch_size", None)
    return Model(
        name=name.split(".")[0],  # without the tag of published weights
        image_size=image_size,
        patch_size=patch,
        options=as_tuples(options),
    )


def starting_encoder(encoder: Encoder, model: Model, seed: int) -> tuple[nn.Module, tuple[str, ...], tuple[str, ...]]:
    """The recipe's encoder with the weights of `encoder`, on the CPU; also the names that are new and left behind.

    Only one part may be new: the norm of the mean of patches, in place of that of tokens (MAE's fine-tuning).

    Raises:
        CheckpointError: more than that differs.
    """
    module = seeded(seed, lambda: build_encoder(model))
    state: dict[str, Tensor] = {name: tensor.detach().cpu() for name, tensor in encoder.module.state_dict().items()}
    own = module.state_dict()
    new = {f"fc_norm.{part}" for part in ("weight", "bias")} & own.keys() - state.keys()
    left = {f"norm.{part}" for part in ("weight", "bias")} & state.keys() - own.keys() if new else set[str]()
    kept = {name: tensor for name, tensor in state.items() if name not in left}
    load_strictly(module, {**kept, **{name: own[name] for name in new}}, where="the encoder to be fine-tuned")
    return module, tuple(sorted(new)), tuple(sorted(left))
