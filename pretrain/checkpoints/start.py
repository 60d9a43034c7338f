"""Whether a folder is this run's, and where the run starts: its own newest sound checkpoint, else `resume_from`,
else `init_from`, else scratch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from data_pipeline.errors import CheckpointError, PretrainError, RecipeError
from pretrain.checkpoints.checkpoint import (
    COMPLETE,
    STATE,
    Checkpoint,
    complete_checkpoints,
    module_state,
    newest_sound,
    open_checkpoint,
    read_state,
    some,
)
from pretrain.models.encoders import CONFIG, OPEN_CLIP_CONFIG, TOWERS, WEIGHTS
from pretrain.objectives.contract import Objective
from pretrain.recipe.files import load_recipe
from pretrain.recipe.recipe import Recipe
from pretrain.recipe.resolve import differences, is_longer
from pretrain.recipe.strict_yaml import read_yaml
from pretrain.runtime.collectives import World, gather_objects
from pretrain.runtime.state import Progress


def refuse_other_run(recipe: Recipe, fingerprint: str, total_steps: int, out: Path) -> None:
    """A folder goes on with its own run only: what changes results must be what it was, the data included.

    One that has finished may go on for longer.

    Raises:
        RecipeError: with everything that differs.
    """
    given, resolved = out / "recipe.yaml", out / "resolved.yaml"
    if not given.is_file():
        return
    kept_recipe = load_recipe(given)
    kept = read_yaml(resolved.read_text())[0] if resolved.is_file() else {}
    problems = differences(recipe, kept_recipe)
    if is_longer(recipe, kept_recipe):
        problems = _not_longer(total_steps, out)
    if not problems and kept.get("data_fingerprint", fingerprint) != fingerprint:
        problems = [
            f"data.train: expected the data (and weights, of a mixture) with fingerprint {kept['data_fingerprint']}, "
            f"found {fingerprint}."
        ]
    if problems:
        problems.append("Choose another folder with --out, or take this run's own recipe.")
        raise RecipeError(f"{out} holds another run", problems)


def _not_longer(given: int, out: Path) -> list[str]:
    complete = complete_checkpoints(out / "checkpoints")
    return not_longer(given, read_state(complete[-1]).progress) if complete else []


def not_longer(given: int, kept: Progress) -> list[str]:
    """Only at its end is a run independent of how long it was to be: the learning rate depends on that."""
    step, total_steps = kept.step, kept.total_steps
    if given != total_steps and step < total_steps:
        return [f"schedule: expected the {total_steps} steps of this run, which is at step {step}, found {given}."]
    if given < total_steps:
        return [f"schedule: expected more than the {total_steps} steps that this run has done, found {given}."]
    return []


@dataclass(frozen=True)
class Start:
    """What a run goes on from.

    Attributes:
        checkpoint: whole training state; None: the weights as they are now.
        source: in a few words.
        notes: for the run's log, a line each.
        unsound: complete checkpoints of the run that were passed over as damaged.
    """

    checkpoint: Checkpoint | None
    source: str
    notes: tuple[str, ...] = ()
    unsound: tuple[Path, ...] = ()


def find_start(recipe: Recipe, objective: Objective, checkpoints: Path | None, world: World) -> Start:
    """Looks in the order of precedence; weights of `init_from` are loaded at once. Every rank calls it.

    Args:
        recipe: of the run.
        objective: still whole, on the CPU.
        checkpoints: the run's own; None: it has none and will have none.

    Raises:
        CheckpointError: something that was asked for is damaged or does not fit; never is another one taken in
            its place. Or all of the run's own are damaged.
    """
    if checkpoints is not None:
        own, passed_over = newest_sound(checkpoints, world)
        if own is not None:
            notes = tuple(f"passed over, damaged: {error.where}: {error.found}" for error in passed_over)
            unsound = tuple(_checkpoint_of(Path(error.where)) for error in passed_over)
            return Start(own, f"from {own.path}", notes, unsound)
    if recipe.resume_from is not None:
        checkpoint = _checkpoint_at(Path(recipe.resume_from), world)
        return Start(checkpoint, f"from {checkpoint.path}", _changes(recipe, checkpoint.path))
    if recipe.init_from is not None:
        return Start(None, f"with weights of {recipe.init_from}", _initialize(objective, Path(recipe.init_from), world))
    return Start(None, "from scratch")


def _checkpoint_at(path: Path, world: World) -> Checkpoint:
    """A checkpoint, or the newest of a run: then it must be that one, as nobody asked for an older."""
    if (path / "checkpoints").is_dir():
        found, passed_over = newest_sound(path / "checkpoints", world)
        if passed_over:
            raise passed_over[0]
        if found is not None:
            return found
    return open_checkpoint(path, world)


def _changes(recipe: Recipe, checkpoint: Path) -> tuple[str, ...]:
    """What is another than in the run that wrote the checkpoint, where its recipe lies beside."""
    kept = checkpoint.resolve().parent.parent / "recipe.yaml"
    if not kept.is_file():
        return ()
    return tuple(f"changed: {change}" for change in differences(recipe, load_recipe(kept)))


def _checkpoint_of(damaged: Path) -> Path:
    """An error names the file; the folder above is the checkpoint."""
    return damaged if damaged.is_dir() else damaged.parent


def _initialize(objective: Objective, path: Path, world: World) -> tuple[str, ...]:
    """Takes the encoder whole, and of the rest what has the same name and shape; says what it did not take.

    Momentum teachers are not taken: they start as the weights that they follow, as they do from scratch.
    """
    problem: PretrainError | None = None
    try:
        stored = _weights(path, world)
        _refuse_other_encoder(objective, stored, path)
    except PretrainError as error:
        problem = error
    for found in gather_objects(problem):
        if found is not None:
            raise found
    followers = followers_of(objective)
    whole = objective.state_dict()
    own = {name: tensor for name, tensor in whole.items() if not name.startswith(tuple(followers))}
    taken = {name for name in own.keys() & stored.keys() if own[name].shape == stored[name].shape}
    refuse_locked_at_random(objective, taken)
    objective.load_state_dict({**whole, **{name: stored[name] for name in taken}})
    for target, online in followers.values():
        target.load_state_dict(online.state_dict())
    follow = [f"as the weights that they follow: {', '.join(name[:-1] for name in followers)}"] if followers else []
    return (
        f"taken from {path}: {_listed(taken)}",
        f"new, as initialised: {_listed(own.keys() - taken)}",
        f"left behind: {_listed(stored.keys() - taken)}",
        *follow,
    )


def refuse_locked_at_random(objective: Objective, taken: Collection[str]) -> None:
    """What is not trained must come from somewhere; momentum teachers follow what is.

    Args:
        objective: as built.
        taken: names of the tensors that `init_from` gives it.

    Raises:
        RecipeError: a parameter would stay at its random start for good.
    """
    follow = tuple(followers_of(objective))
    locked = {name for name, p in objective.named_parameters() if not p.requires_grad and not name.startswith(follow)}
    if random := locked - set(taken):
        problem = (
            "init_from: expected weights for all that the objective locks, found none for "
            f"{_listed(random)}. Give a run, checkpoint or folder that has them, or lock less."
        )
        raise RecipeError("the start", [problem])


def followers_of(objective: Objective) -> dict[str, tuple[nn.Module, nn.Module]]:
    """Momentum teachers and what they follow, by what the names of a teacher's tensors begin with."""
    names = {module: name for name, module in objective.named_modules()}
    _, pairs = objective.ema(Progress(0, 1, 0))
    return {f"{names[target]}.": (target, online) for target, online in pairs}


def _weights(path: Path, world: World) -> Mapping[str, Tensor]:
    """Parameters and buffers under the objective's names, of a run, a checkpoint, an encoder folder or a file."""
    if (path / "checkpoints").is_dir():
        newest, passed_over = newest_sound(path / "checkpoints", world)
        if passed_over:
            raise passed_over[0]
        path = newest.path if newest is not None else path / "encoder"
    if (path / COMPLETE).is_file() or (path / STATE).is_file():
        return module_state(open_checkpoint(path, world).path, verified=True)
    if (path / OPEN_CLIP_CONFIG).is_file() or (path / TOWERS).is_dir():
        from pretrain.models.tower_folders import objective_weights  # open_clip takes seconds

        return objective_weights(path)
    file = path / WEIGHTS if (path / CONFIG).is_file() else path
    try:
        return {f"encoder.{name}": tensor for name, tensor in load_file(file).items()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            where=str(path), expected="a run, a checkpoint, an encoder folder or a safetensors file",
            found=f"{type(error).__name__}: {error}",
        ) from None  # fmt: skip


def _refuse_other_encoder(objective: nn.Module, stored: Mapping[str, Tensor], path: Path) -> None:
    """A part of an encoder is no start: what it would give lies somewhere between two models."""
    own = {name: t.shape for name, t in objective.state_dict().items() if name.startswith("encoder.")}
    theirs = {name: t.shape for name, t in stored.items() if name.startswith("encoder.")}
    missing = own.keys() - theirs.keys()
    other = {name for name in own.keys() & theirs.keys() if own[name] != theirs[name]}
    unknown = theirs.keys() - own.keys()
    if missing or other or unknown:
        raise CheckpointError(
            where=f"init_from {path}", expected="the whole encoder of this recipe's `model`",
            found=f"missing {some(missing)}; of another shape {some(other)}; unknown {some(unknown)}",
            fix="Give the recipe the model that the weights were trained with.",
        )  # fmt: skip


def _listed(names: set[str]) -> str:
    """Counted by their first part: "150 of encoder, 2 of head"."""
    parts: dict[str, int] = {}
    for name in names:
        part = name.split(".")[0]
        parts[part] = parts.get(part, 0) + 1
    return ", ".join(f"{count} of {part}" for part, count in sorted(parts.items())) or "nothing"
