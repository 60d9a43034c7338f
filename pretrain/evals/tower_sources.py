"""Where two towers come from: a run of kind clip or siglip, a checkpoint, an encoder folder, or open_clip's names."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from data_pipeline.batch import TokenSpec
from data_pipeline.errors import CheckpointError, InputError
from data_pipeline.views import ViewSpec
from pretrain.checkpoint import module_state, read_state
from pretrain.evals.hf_sources import hf_towers
from pretrain.evals.open_clip_sources import from_open_clip
from pretrain.evals.timm_sources import checked_views
from pretrain.models.encoders import EncoderConfig, load_strictly
from pretrain.models.hf_folders import is_hf_folder
from pretrain.models.input_size import set_image_size
from pretrain.models.tokenizers import build_tokenizer
from pretrain.models.tower_folders import load_towers_folder
from pretrain.models.towers import Towers, TwoTowers, build_parts
from pretrain.objectives.build import build_objective
from pretrain.recipe import Recipe
from pretrain.recipe_io import load_recipe
from pretrain.recipe_objective import Clip, Siglip


@dataclass(frozen=True)
class _Found:
    module: TwoTowers
    tokens: TokenSpec
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    views: ViewSpec
    tag: str
    description: dict[str, object]
    run: Path | None = None


def load_towers(
    spec: str,
    *,
    random_init: bool = False,
    seed: int | None = None,
    weights: Path | None = None,
    tokenizer: str | None = None,
    image_size: int | None = None,
) -> Towers:
    """The two towers that `spec` names, on the CPU, in evaluation mode, with exactly their weights.

    Args:
        spec: a run's folder, a checkpoint in one, an encoder folder that holds both towers, a folder of Hugging
            Face's CLIPModel, or the name of one of open_clip's model configurations, perhaps with a tag of published
            weights (NAME:TAG), which are downloaded.
        random_init: the same architecture with fresh weights; of a run, those that it began with.
        seed: of the fresh weights; None: the run's own, or 0.
        weights: of a configuration: a local file (safetensors, or a PyTorch file of tensors).
        tokenizer: as in a recipe, in the place of the one that the towers name.
        image_size: pixels, for which the position embedding of the image tower is interpolated; None: its own.

    Raises:
        InputError: nothing there, or arguments that do not go together.
        CheckpointError: weights that are damaged, not finite, or not exactly those of the towers.
    """
    path = Path(spec)
    if path.is_dir() and weights is not None:
        raise InputError(where="weights", expected=f"none, as {spec} has its own", found=str(weights))
    if (path / "recipe.yaml").is_file():
        found = _from_run(path, random_init, seed)
    elif (path / "state.json").is_file() or (path / "COMPLETE").is_file():
        found = _from_checkpoint(path, random_init, seed)
    elif is_hf_folder(path):
        found = _from_hf(path, random_init, seed or 0, tokenizer, image_size)
    elif path.is_dir():
        found = _from_folder(path, random_init, seed or 0)
    else:
        found = _by_name(spec, random_init, seed or 0, weights)
    found = _at_size(found, image_size)
    tokens = found.tokens if tokenizer is None else replace(found.tokens, tokenizer=tokenizer)
    built = build_tokenizer(tokens)
    return Towers(
        found.module.eval().requires_grad_(False),
        built,
        found.image_size,
        found.mean,
        found.std,
        found.views,
        found.tag,
        found.description,
        found.run,
    )


def _at_size(found: _Found, size: int | None) -> _Found:
    if size is None:
        return found
    told = set_image_size(found.module.encoder, found.image_size, size)
    description = {**found.description, "position_embedding": told} if told else found.description
    return replace(found, image_size=size, description=description)


def _from_run(run: Path, random_init: bool, seed: int | None) -> _Found:
    recipe = _recipe(run / "recipe.yaml")
    description: dict[str, object] = {"source": str(run), "kind": "run", "recipe": recipe.name}
    if random_init:
        return _start_of_run(run, recipe, description, seed)
    module, _, _ = load_towers_folder(run / "encoder")
    return _of_recipe(module, recipe, "encoder", run, description)


def _from_checkpoint(checkpoint: Path, random_init: bool, seed: int | None) -> _Found:
    run = checkpoint.resolve().parent.parent
    recipe = _recipe(run / "recipe.yaml")
    description: dict[str, object] = {"source": str(checkpoint), "kind": "checkpoint", "recipe": recipe.name}
    if random_init:
        return _start_of_run(run, recipe, description, seed)
    module = _towers_of(recipe)
    load_strictly(module, module_state(checkpoint), where=str(checkpoint))
    progress = read_state(checkpoint).progress
    description |= {"step": progress.step, "samples_seen": progress.samples_seen}
    return _of_recipe(module, recipe, checkpoint.name, run, description)


def _start_of_run(run: Path, recipe: Recipe, description: dict[str, object], seed: int | None) -> _Found:
    seed = recipe.seed if seed is None else seed
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        state = build_objective(recipe.model, recipe.objective).state_dict()
    module = _towers_of(recipe)
    load_strictly(module, state, where=str(run))
    return _of_recipe(module, recipe, "random", run, {**description, "init_seed": seed})


def _towers_of(recipe: Recipe) -> TwoTowers:
    assert isinstance(recipe.objective, Clip | Siglip)
    with torch.random.fork_rng(devices=[]):
        parts = build_parts(recipe.model, recipe.objective.embed_dim, recipe.objective.text)
    return TwoTowers(parts, has_bias=isinstance(recipe.objective, Siglip))


def _of_recipe(module: TwoTowers, recipe: Recipe, tag: str, run: Path, description: dict[str, object]) -> _Found:
    assert isinstance(recipe.objective, Clip | Siglip)
    return _Found(
        module,
        TokenSpec(recipe.objective.tokenizer, module.parts.context_length, module.parts.vocab_size),
        recipe.model.image_size,
        recipe.data.mean,
        recipe.data.std,
        ViewSpec(interpolation=recipe.data.views.interpolation, eval_crop=recipe.data.views.eval_crop),
        tag,
        {"architecture": recipe.model.name, **description},
        run,
    )


def _recipe(path: Path) -> Recipe:
    if not path.is_file():
        raise CheckpointError(
            where=str(path),
            expected="the recipe of the run that wrote the checkpoint",
            found="no such file",
            fix="Leave a checkpoint in its run's folder: RUN/checkpoints/step_XXXXXXXX.",
        )
    recipe = load_recipe(path)
    if not isinstance(recipe.objective, Clip | Siglip):
        raise InputError(
            where=str(path.parent),
            expected="a run of kind clip or siglip, which has a text tower",
            found=recipe.objective.kind,
        )
    return recipe


def _from_folder(folder: Path, random_init: bool, seed: int) -> _Found:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module, config, tokens = load_towers_folder(folder, fresh=random_init)
    description: dict[str, object] = {"architecture": config.name, "source": str(folder), "kind": "encoder folder"}
    if random_init:
        description["init_seed"] = seed
    return _of_config(module, config, tokens, description, random_init)


def _from_hf(folder: Path, random_init: bool, seed: int, tokenizer: str | None, image_size: int | None) -> _Found:
    module, own_size, preprocessing, tokens, description = hf_towers(
        folder, random_init=random_init, seed=seed, tokenizer=tokenizer, image_size=image_size
    )
    return _Found(
        module,
        tokens,
        own_size,
        preprocessing.mean,
        preprocessing.std,
        preprocessing.views,
        "random" if random_init else "encoder",
        {**description, "init_seed": seed} if random_init else description,
    )


def _by_name(spec: str, random_init: bool, seed: int, weights: Path | None) -> _Found:
    module, config, tokens, description = from_open_clip(spec, random_init=random_init, seed=seed, weights=weights)
    return _of_config(module, config, tokens, description, random_init)


def _of_config(
    module: TwoTowers, config: EncoderConfig, tokens: TokenSpec, description: dict[str, object], random_init: bool
) -> _Found:
    return _Found(
        module,
        tokens,
        config.image_size,
        config.mean,
        config.std,
        checked_views(
            config.interpolation, config.eval_crop, where=str(description["source"]), eval_resize=config.eval_resize
        ),
        "random" if random_init else "encoder",
        description,
    )
