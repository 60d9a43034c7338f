"""Where two towers come from: a run of kind clip or siglip, a checkpoint, an encoder folder, or open_clip's names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from data_pipeline.batch import TokenSpec
from data_pipeline.errors import InputError
from pretrain.checkpoints.checkpoint import module_state, read_state
from pretrain.evals.encoder import Encoder
from pretrain.evals.sources.hugging_face import hf_towers
from pretrain.evals.sources.load import at_size, check_ignore, of_config, run_of_checkpoint
from pretrain.evals.sources.open_clip_names import from_open_clip
from pretrain.evals.sources.trained import TrainedRun
from pretrain.models.hf_folders import is_hf_folder
from pretrain.models.seeded import seeded
from pretrain.models.strict_loading import load_strictly
from pretrain.models.tokenizers import build_tokenizer
from pretrain.models.tower_folders import load_towers_folder
from pretrain.models.towers import Towers, TwoTowers, build_parts, token_spec
from pretrain.objectives.config import ImageTextConfig
from pretrain.objectives.kinds import build_objective


class _Found(NamedTuple):
    towers: TwoTowers
    encoder: Encoder  # their image tower
    tokens: TokenSpec


def load_towers(
    spec: str,
    *,
    random_init: bool = False,
    seed: int | None = None,
    weights: Path | None = None,
    ignore: tuple[str, ...] = (),
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
        ignore: patterns of tensors of that file that are left out where the towers do not need them.
        tokenizer: as in a recipe, in the place of the one that the towers name.
        image_size: pixels, for which the position embedding of the image tower is interpolated; None: its own.

    Raises:
        InputError: nothing there, or arguments that do not go together.
        CheckpointError: weights that are damaged, not finite, or not exactly those of the towers.
    """
    path = Path(spec)
    if path.is_dir() and weights is not None:
        raise InputError(where="weights", expected=f"none, as {spec} has its own", found=str(weights))
    check_ignore(ignore, spec, weights)
    if (path / "recipe.yaml").is_file():
        found = _from_run(path, random_init, seed)
    elif (path / "state.json").is_file() or (path / "COMPLETE").is_file():
        found = _from_checkpoint(path, random_init, seed)
    elif is_hf_folder(path):
        towers = hf_towers(path, random_init=random_init, seed=seed or 0, tokenizer=tokenizer, image_size=image_size)
        found = _Found(*towers)
    elif path.is_dir():
        found = _from_folder(path, random_init, seed or 0)
    elif "/" in spec and ":" not in spec:
        known = "a run, a checkpoint, a folder of two towers, or a name of open_clip's"
        raise InputError(where=spec, expected=known, found="nothing there")
    else:
        found = _by_name(spec, random_init, seed or 0, weights, ignore)
    encoder = at_size(found.encoder, image_size)
    tokens = found.tokens if tokenizer is None else replace(found.tokens, tokenizer=tokenizer)
    return _assembled(found.towers.eval().requires_grad_(False), encoder, tokens)


def _assembled(towers: TwoTowers, encoder: Encoder, tokens: TokenSpec) -> Towers:
    return Towers(
        towers,
        build_tokenizer(tokens),
        encoder.preprocessing,
        encoder.tag,
        encoder.description,
        encoder.run,
        encoder.notes,
    )


def trained_towers(towers: TwoTowers, run: TrainedRun, *, tag: str, description: Mapping[str, object]) -> Towers:
    """Two towers that a run trained, with its recipe's preprocessing and tokenizer."""
    found = _trained(towers, run, tag, description)
    return _assembled(found.towers, found.encoder, found.tokens)


def build_towers(run: TrainedRun) -> TwoTowers:
    """The two towers of a run, on the CPU, whose weights are to be loaded."""
    objective = _image_text(run)
    parts = seeded(0, lambda: build_parts(run.model, objective.embed_dim, objective.text))
    return TwoTowers(parts, has_bias=objective.has_bias)


def _from_run(folder: Path, random_init: bool, seed: int | None) -> _Found:
    run = TrainedRun.load(folder)
    _image_text(run)
    description: dict[str, object] = {"source": str(folder), "kind": "run", "recipe": run.name}
    if random_init:
        return _start_of_run(run, description, seed)
    towers, _, _ = load_towers_folder(folder / "encoder")
    return _trained(towers, run, "encoder", description)


def _from_checkpoint(checkpoint: Path, random_init: bool, seed: int | None) -> _Found:
    run = run_of_checkpoint(checkpoint)
    _image_text(run)
    description: dict[str, object] = {"source": str(checkpoint), "kind": "checkpoint", "recipe": run.name}
    if random_init:
        return _start_of_run(run, description, seed)
    towers = build_towers(run)
    load_strictly(towers, module_state(checkpoint), where=str(checkpoint))
    progress = read_state(checkpoint).progress
    description |= {"step": progress.step, "samples_seen": progress.samples_seen}
    return _trained(towers, run, checkpoint.name, description)


def _start_of_run(run: TrainedRun, description: dict[str, object], seed: int | None) -> _Found:
    seed = run.seed if seed is None else seed
    state = seeded(seed, lambda: build_objective(run.model, run.objective).state_dict())
    towers = build_towers(run)
    load_strictly(towers, state, where=str(run.folder))
    return _trained(towers, run, "random", {**description, "init_seed": seed})


def _trained(towers: TwoTowers, run: TrainedRun, tag: str, description: Mapping[str, object]) -> _Found:
    encoder = Encoder.of_recipe(towers.encoder, run.model, run.data, tag=tag, run=run.folder, description=description)
    return _Found(towers, encoder, token_spec(run.model, towers.parts, _image_text(run).tokenizer))


def _image_text(run: TrainedRun) -> ImageTextConfig:
    """The objective of a run that trained two towers; InputError where it did not."""
    if not isinstance(run.objective, ImageTextConfig):
        raise InputError(
            where=str(run.folder),
            expected="a run of kind clip or siglip, which has a text tower",
            found=run.objective.kind,
        )
    return run.objective


def _from_folder(folder: Path, random_init: bool, seed: int) -> _Found:
    towers, config, tokens = seeded(seed, lambda: load_towers_folder(folder, fresh=random_init))
    description: dict[str, object] = {"architecture": config.name, "source": str(folder), "kind": "encoder folder"}
    if random_init:
        description["init_seed"] = seed
    return _Found(towers, of_config(towers.encoder, config, description, random_init), tokens)


def _by_name(spec: str, random_init: bool, seed: int, weights: Path | None, ignore: tuple[str, ...]) -> _Found:
    towers, config, tokens, description, notes = from_open_clip(
        spec, random_init=random_init, seed=seed, weights=weights, ignore=ignore
    )
    encoder = of_config(towers.encoder, config, description, random_init)
    return _Found(towers, replace(encoder, notes=notes), tokens)
