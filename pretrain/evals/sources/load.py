"""Where an encoder comes from: a run, a checkpoint, a folder, a weights file, or a name of timm's or open_clip's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import timm
from torch import nn

from data_pipeline.errors import CheckpointError, InputError
from pretrain.checkpoints.checkpoint import module_state, read_state
from pretrain.evals.encoder import Encoder
from pretrain.evals.sources.timm_names import Architecture, checked, from_file, from_timm, nearest
from pretrain.evals.sources.trained import TrainedRun
from pretrain.models.encoder_folders import EncoderConfig
from pretrain.models.folders import CONFIG, OPEN_CLIP_CONFIG
from pretrain.models.hf_folders import is_hf_folder
from pretrain.models.input_size import set_image_size
from pretrain.models.load_encoder import load_encoder
from pretrain.models.seeded import seeded
from pretrain.models.strict_loading import load_strictly
from pretrain.models.weights_files import WHOLE, Part
from pretrain.objectives.kinds import build_objective


def load_source(
    spec: str,
    *,
    random_init: bool = False,
    seed: int | None = None,
    architecture: Architecture | None = None,
    weights: Path | None = None,
    part: Part = WHOLE,
) -> Encoder:
    """The encoder that `spec` names, on the CPU, with exactly its weights.

    Args:
        spec: a run's folder, a checkpoint in one, a folder as timm, open_clip or Hugging Face's transformers save it,
            a weights file (safetensors, or a PyTorch file of tensors), the name of a timm model, or one of open_clip's
            with a tag of published weights (NAME:TAG). Published weights are downloaded.
        random_init: the same architecture with fresh weights; of a run, those that it began with.
        seed: of the fresh weights; None: the run's own, or 0.
        architecture: of a weights file; of a timm model, where it is not to be built as timm has it; else its
            `image_size` alone counts, for which a ViT's position embedding is interpolated.
        weights: of one of open_clip's models: a local file.
        part: which tensors of a weights file are the encoder's.

    Raises:
        InputError: nothing there, or arguments that do not go together.
        CheckpointError: weights that are damaged, not finite, or not exactly those of the architecture.
    """
    path = Path(spec)
    if weights is not None and (path.exists() or not is_open_clip(spec)):
        raise InputError("--weights", "none, as only a name of open_clip's goes with a file", f"{spec}, {weights}")
    if (part.key or part.prefix) and not path.is_file():
        raise InputError("--weights-key, --weights-prefix", "none of them, as they choose from a weights file", spec)
    check_ignore(part.ignore, spec, path if path.is_file() else weights)
    if path.is_dir():
        size = _size_alone(spec, architecture)
        return at_size(_from_folder(path, random_init, seed, size), size)
    if path.is_file():
        if architecture is None or architecture.name == spec:
            raise InputError(
                where=spec,
                expected="the architecture of a weights file",
                found="weights alone",
                fix="Name it with --model, and --image-size and --option where it differs from timm's.",
            )
        return from_file(path, architecture, random_init=random_init, seed=seed or 0, part=part)
    if (weights is not None or not timm.is_model(spec)) and is_open_clip(spec):
        size = _size_alone(spec, architecture)
        return at_size(_from_open_clip(spec, random_init, seed or 0, weights, part.ignore), size)
    if not timm.is_model(spec):
        raise _nothing(spec)
    architecture = architecture or Architecture(spec)
    if architecture.name != spec:
        raise InputError(where="--model", expected=f"nothing, as the source is {spec}", found=architecture.name)
    return from_timm(architecture, random_init=random_init, seed=seed or 0)


def check_ignore(ignore: Sequence[str], spec: str, file: Path | None) -> None:
    """Raises InputError where patterns are given and no weights file of somebody's, from which they leave out."""
    if ignore and file is None:
        raise InputError("--weights-ignore", "none, as it leaves tensors of a weights file out", spec)


def is_open_clip(spec: str) -> bool:
    """One of open_clip's names, perhaps with the tag of published weights."""
    from open_clip import list_models  # half a second, which other sources need not wait

    return spec.partition(":")[0] in list_models()


def check_source(spec: str, *, random_init: bool = False) -> None:
    """That there is something to be loaded under this name, be it one encoder or two towers; reads no weights.

    Raises:
        InputError: there is not.
    """
    path = Path(spec)
    if path.is_dir():
        if _source_kind(path) == "run" and not random_init and not (path / "encoder").is_dir():
            raise CheckpointError(
                where=spec, expected="a run with an encoder, which it writes when it saves", found="no folder encoder/",
                fix="Train it first.",
            )  # fmt: skip
    elif not (path.is_file() or timm.is_model(spec) or is_open_clip(spec)):
        raise _nothing(spec)


def _nothing(spec: str) -> InputError:
    return InputError(
        where=spec,
        expected="a run, a checkpoint, an encoder folder, a weights file, or a name of timm's or open_clip's",
        found="none of these",
        fix=nearest(spec),
    )


def _size_alone(spec: str, architecture: Architecture | None) -> int | None:
    if architecture is None:
        return None
    if architecture.name != spec or architecture.options:
        raise InputError(
            where="--model, --option",
            expected=f"none of them, as {spec} says its own architecture",
            found=str(architecture),
        )
    return architecture.image_size


def at_size(encoder: Encoder, size: int | None) -> Encoder:
    """For images of `size` pixels; None: of its own."""
    if size is None:
        return encoder
    told = set_image_size(encoder.module, encoder.preprocessing.image_size, size)
    description = {**encoder.description, "position_embedding": told} if told else encoder.description
    preprocessing = replace(encoder.preprocessing, image_size=size)
    return replace(encoder, preprocessing=preprocessing, description=description)


def _from_folder(path: Path, random_init: bool, seed: int | None, size: int | None) -> Encoder:
    match _source_kind(path):
        case "run":
            return _from_run(path, random_init, seed)
        case "checkpoint":
            return _from_checkpoint(path, random_init, seed)
        case "transformers":
            from pretrain.evals.sources.hugging_face import hf_encoder  # open_clip's modules compute its CLIP

            return hf_encoder(path, random_init=random_init, seed=seed or 0, image_size=size)
        case "encoder":
            return _from_encoder_folder(path, random_init, seed or 0)


def _source_kind(path: Path) -> Literal["run", "checkpoint", "transformers", "encoder"]:
    if (path / "recipe.yaml").is_file():
        return "run"
    if (path / "state.json").is_file() or (path / "COMPLETE").is_file():
        return "checkpoint"
    if is_hf_folder(path):
        return "transformers"
    if (path / CONFIG).is_file() or (path / OPEN_CLIP_CONFIG).is_file():
        return "encoder"
    raise CheckpointError(
        where=str(path),
        expected=f"a run (recipe.yaml), a checkpoint (state.json, COMPLETE), an encoder ({CONFIG}, {OPEN_CLIP_CONFIG})",
        found="a folder with none of these",
    )


def _from_run(folder: Path, random_init: bool, seed: int | None) -> Encoder:
    run = TrainedRun.load(folder)
    description: dict[str, object] = {"source": str(folder), "kind": "run", "recipe": run.name}
    if random_init:
        return _start_of_run(run, description, seed)
    module, _ = load_encoder(folder / "encoder")
    return Encoder.of_recipe(module, run.model, run.data, tag="encoder", run=folder, description=description)


def _from_checkpoint(checkpoint: Path, random_init: bool, seed: int | None) -> Encoder:
    run = run_of_checkpoint(checkpoint)
    description: dict[str, object] = {"source": str(checkpoint), "kind": "checkpoint", "recipe": run.name}
    if random_init:
        return _start_of_run(run, description, seed)
    module = seeded(0, lambda: build_objective(run.model, run.objective).encoder)
    load_strictly(module, module_state(checkpoint, "encoder."), where=str(checkpoint))
    progress = read_state(checkpoint).progress
    description |= {"step": progress.step, "samples_seen": progress.samples_seen}
    return Encoder.of_recipe(module, run.model, run.data, tag=checkpoint.name, run=run.folder, description=description)


def run_of_checkpoint(checkpoint: Path) -> TrainedRun:
    """The run that wrote a checkpoint.

    Raises:
        CheckpointError: the checkpoint lies elsewhere.
    """
    run = checkpoint.resolve().parent.parent
    if not (run / "recipe.yaml").is_file():
        raise CheckpointError(
            where=str(run / "recipe.yaml"),
            expected="the recipe of the run that wrote the checkpoint",
            found="no such file",
            fix="Leave a checkpoint in its run's folder: RUN/checkpoints/step_XXXXXXXX.",
        )
    return TrainedRun.load(run)


def _start_of_run(run: TrainedRun, description: Mapping[str, object], seed: int | None) -> Encoder:
    """As the objective initializes it, which need not be as timm does."""
    seed = run.seed if seed is None else seed
    module = seeded(seed, lambda: build_objective(run.model, run.objective).encoder)
    fresh = {**description, "init_seed": seed}
    return Encoder.of_recipe(module, run.model, run.data, tag="random", run=run.folder, description=fresh)


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
    if config.library == "timm" and getattr(module, "num_classes", None):
        module.reset_classifier(0)  # type: ignore[operator]
        description["classifier_left_out"] = timm.models.get_pretrained_cfg_value(config.name, "classifier")
    return of_config(module, config, description, random_init)


def _from_open_clip(spec: str, random_init: bool, seed: int, weights: Path | None, ignore: tuple[str, ...]) -> Encoder:
    from pretrain.evals.sources.open_clip_names import from_open_clip

    towers, config, _, description, notes = from_open_clip(
        spec, random_init=random_init, seed=seed, weights=weights, ignore=ignore
    )
    return replace(of_config(towers.encoder, config, description, random_init), notes=notes)


def of_config(
    module: nn.Module, config: EncoderConfig, description: Mapping[str, object], random_init: bool
) -> Encoder:
    """An encoder with the preprocessing that its configuration says."""
    where = str(description["source"])
    return Encoder(
        module,
        checked(config.preprocessing, where=where),
        tag="random" if random_init else "encoder",
        description=description,
    )
