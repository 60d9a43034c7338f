"""Where an encoder comes from: a run, a checkpoint, an encoder folder, a weights file or timm."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import timm

from data_pipeline.errors import CheckpointError, InputError
from pretrain.checkpoint import module_state, read_state
from pretrain.evals.encoder import Encoder
from pretrain.evals.timm_sources import Architecture, checked_views, from_file, from_timm, nearest, seeded
from pretrain.models.encoders import CONFIG, OPEN_CLIP_CONFIG, load_encoder, load_strictly
from pretrain.objectives.build import build_objective
from pretrain.recipe import Recipe
from pretrain.recipe_io import load_recipe


def load_source(
    spec: str, *, random_init: bool = False, seed: int | None = None, architecture: Architecture | None = None
) -> Encoder:
    """The encoder that `spec` names, on the CPU, with exactly its weights.

    Args:
        spec: a run's folder, a checkpoint in one, a folder as timm saves it, a weights file (safetensors, or
            a PyTorch file of tensors), or the name of a timm model: its published weights are downloaded.
        random_init: the same architecture with fresh weights; of a run, those that it began with.
        seed: of the fresh weights; None: the run's own, or 0.
        architecture: of a weights file; of a timm model, where it is not to be built as timm has it.

    Raises:
        InputError: nothing there, or arguments that do not go together.
        CheckpointError: weights that are damaged, not finite, or not exactly those of the architecture.
    """
    path = Path(spec)
    if path.is_dir():
        if architecture is not None:
            raise InputError(
                where="--model, --image-size, --option",
                expected=f"none of them, as {spec} says its own architecture",
                found=str(architecture),
            )
        return _from_folder(path, random_init, seed)
    if path.is_file():
        if architecture is None:
            raise InputError(
                where=spec,
                expected="the architecture of a weights file",
                found="weights alone",
                fix="Name it with --model, and --image-size and --option where it differs from timm's.",
            )
        return from_file(path, architecture, random_init=random_init, seed=seed or 0)
    if not timm.is_model(spec):
        raise InputError(
            where=spec,
            expected="a run, a checkpoint, an encoder folder, a weights file, or the name of a timm model",
            found="none of these",
            fix=nearest(spec),
        )
    architecture = architecture or Architecture(spec)
    if architecture.name != spec:
        raise InputError(where="--model", expected=f"nothing, as the source is {spec}", found=architecture.name)
    return from_timm(architecture, random_init=random_init, seed=seed or 0)


def _from_folder(path: Path, random_init: bool, seed: int | None) -> Encoder:
    if (path / "recipe.yaml").is_file():
        return _from_run(path, random_init, seed)
    if (path / "state.json").is_file() or (path / "COMPLETE").is_file():
        return _from_checkpoint(path, random_init, seed)
    if (path / CONFIG).is_file() or (path / OPEN_CLIP_CONFIG).is_file():
        return _from_encoder_folder(path, random_init, seed or 0)
    raise CheckpointError(
        where=str(path),
        expected=f"a run (recipe.yaml), a checkpoint (state.json, COMPLETE), an encoder ({CONFIG}, {OPEN_CLIP_CONFIG})",
        found="a folder with none of these",
    )


def _from_run(run: Path, random_init: bool, seed: int | None) -> Encoder:
    recipe = load_recipe(run / "recipe.yaml")
    description: dict[str, object] = {"source": str(run), "kind": "run", "recipe": recipe.name}
    if random_init:
        return _start_of_run(run, recipe, description, seed)
    module, _ = load_encoder(run / "encoder")
    return Encoder.of_recipe(module, recipe, tag="encoder", run=run, description=description)


def _from_checkpoint(checkpoint: Path, random_init: bool, seed: int | None) -> Encoder:
    run = checkpoint.resolve().parent.parent
    if not (run / "recipe.yaml").is_file():
        raise CheckpointError(
            where=str(run / "recipe.yaml"),
            expected="the recipe of the run that wrote the checkpoint",
            found="no such file",
            fix="Leave a checkpoint in its run's folder: RUN/checkpoints/step_XXXXXXXX.",
        )
    recipe = load_recipe(run / "recipe.yaml")
    description: dict[str, object] = {"source": str(checkpoint), "kind": "checkpoint", "recipe": recipe.name}
    if random_init:
        return _start_of_run(run, recipe, description, seed)
    module = seeded(0, lambda: build_objective(recipe.model, recipe.objective).encoder)
    load_strictly(module, module_state(checkpoint, "encoder."), where=str(checkpoint))
    progress = read_state(checkpoint).progress
    description |= {"step": progress.step, "samples_seen": progress.samples_seen}
    return Encoder.of_recipe(module, recipe, tag=checkpoint.name, run=run, description=description)


def _start_of_run(run: Path, recipe: Recipe, description: Mapping[str, object], seed: int | None) -> Encoder:
    """As the objective initialises it, which need not be as timm does."""
    seed = recipe.seed if seed is None else seed
    module = seeded(seed, lambda: build_objective(recipe.model, recipe.objective).encoder)
    fresh = {**description, "init_seed": seed}
    return Encoder.of_recipe(module, recipe, tag="random", run=run, description=fresh)


def _from_encoder_folder(folder: Path, random_init: bool, seed: int) -> Encoder:
    module, config = load_encoder(folder)
    description: dict[str, object] = {
        "source": str(folder),
        "kind": "encoder folder",
        "architecture": config.name,
    }
    if random_init:
        module = seeded(seed, config.build)
        description["init_seed"] = seed
    return Encoder(
        module,
        image_size=config.image_size,
        mean=config.mean,
        std=config.std,
        views=checked_views(config.interpolation, config.eval_crop, where=str(folder)),
        tag="random" if random_init else "encoder",
        description=description,
    )
