"""Where a run starts: its own newest sound checkpoint, else `resume_from`, else `init_from`, else scratch."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from data_pipeline.errors import CheckpointError, RecipeError
from pretrain.checkpoints.checkpoint import (
    Checkpoint,
    load,
    load_auxiliary,
    module_state,
    newest_sound,
    open_checkpoint,
)
from pretrain.checkpoints.files import AUXILIARY_PREFIX, STATE, some
from pretrain.engine.training_state import Fragment, TrainingState
from pretrain.models.folders import CONFIG, OPEN_CLIP_CONFIG, TOWERS, WEIGHTS
from pretrain.models.foreign.fitting import first_parts, joined_chunks, note_on_ignored, without_ignored
from pretrain.objectives.contract import Objective
from pretrain.runtime.agreement import agree
from pretrain.runtime.collectives import World
from pretrain.runtime.run_folder import COMPLETE
from pretrain.runtime.state import Progress, RunState

_ENCODER = "encoder."  # with which the names of an encoder's tensors begin in an objective


@dataclass(frozen=True)
class Start:
    """What a run goes on from.

    Attributes:
        checkpoint: whole training state; None: the weights as they are now.
        source: in a few words.
        own: whether the checkpoint is the run's own.
        notes: for the run's log, a line each.
        unsound: complete checkpoints of the run that were passed over as damaged.
    """

    checkpoint: Checkpoint | None
    source: str
    own: bool = False
    notes: tuple[str, ...] = ()
    unsound: tuple[Path, ...] = ()


def find_start(
    objective: Objective, checkpoints: Path | None, world: World, *, resume_from: str | None, init_from: str | None,
    init_ignore: Sequence[str] = (),
) -> Start:  # fmt: skip
    """Looks in the order of precedence; weights of `init_from` are loaded at once. Every rank calls it.

    Args:
        objective: still whole, on the CPU.
        checkpoints: the run's own; None: it has none and will have none.
        world: this process among the ranks.
        resume_from: a checkpoint or run whose whole state is taken, as in a recipe.
        init_from: a run, checkpoint, folder or file whose weights are taken, as in a recipe.
        init_ignore: patterns of its tensors that are left out where the encoder does not need them, as in a recipe.

    Raises:
        CheckpointError: something that was asked for is damaged or does not fit; never is another one taken in
            its place. Or all of the run's own are damaged.
    """
    if checkpoints is not None:
        own, passed_over = newest_sound(checkpoints, world)
        if own is not None:
            notes = tuple(f"passed over, damaged: {error.where}: {error.found}" for error in passed_over)
            unsound = tuple(_checkpoint_folder(Path(error.where)) for error in passed_over)
            return Start(own, f"from {own.path}", True, notes, unsound)
    if resume_from is not None:
        checkpoint = _checkpoint_at(Path(resume_from), world)
        return Start(checkpoint, f"from {checkpoint.path}")
    if init_from is not None:
        notes = _initialize(objective, Path(init_from), world, init_ignore)
        return Start(None, f"with weights of {init_from}", notes=notes)
    return Start(None, "from scratch")


def resume(
    start: Start, trained: TrainingState, auxiliary: Sequence[Fragment], total_steps: int
) -> tuple[RunState, Start]:
    """Loads the tensors that a run goes on from. Every rank calls it.

    Args:
        start: of the run; its checkpoint is closed.
        trained: takes the training state.
        auxiliary: state of the online probe, which takes the stored one if there is a fitting one.
        total_steps: of the run, which is the recipe's to say.

    Returns:
        The state to go on from, and the start with notes on the online probe.
    """
    if start.checkpoint is None:
        return RunState(Progress(0, total_steps, 0)), start
    state = load(start.checkpoint, trained)
    notes: tuple[str, ...] = ()
    had_probe = any(name.startswith(AUXILIARY_PREFIX) for name in start.checkpoint.tensors.shapes)
    if auxiliary and not load_auxiliary(start.checkpoint, auxiliary):
        notes = (f"the online probe starts anew: the checkpoint has {'another' if had_probe else 'none'}",)
    if not auxiliary and had_probe:
        notes = ("the checkpoint's online probe is left behind",)
    start.checkpoint.close()  # or its files would be held, removed or not, for as long as the run goes on
    if start.own and (problems := length_problems(total_steps, state.progress)):
        run = start.checkpoint.path.parent.parent
        raise RecipeError(f"{run} holds another run", problems)  # its last checkpoint was passed over
    if start.own and total_steps > (done := state.progress.total_steps):
        longer = (
            f"extended from {done} to {total_steps} steps: the learning rate is that of step {done} of {total_steps}"
        )
        notes = (*notes, f"{longer}, not the one that the shorter run ended with")
    state = replace(state, progress=replace(state.progress, total_steps=total_steps))
    return state, replace(start, notes=(*start.notes, *notes))


def length_problems(given: int, kept: Progress) -> list[str]:
    """Says why a run of `kept` progress cannot be `given` steps long; empty: it can.

    Only at its end is a run independent of how long it was to be: before, the learning rate depends on that.
    """
    step, total_steps = kept.step, kept.total_steps
    if given != total_steps and step < total_steps:
        return [f"schedule: expected the {total_steps} steps of this run, which is at step {step}, found {given}."]
    if given < total_steps:
        return [f"schedule: expected more than the {total_steps} steps that this run has done, found {given}."]
    return []


def _checkpoint_at(path: Path, world: World) -> Checkpoint:
    """Opens a checkpoint, or the newest of a run: then it must be that one, as nobody asked for an older."""
    if (path / "checkpoints").is_dir():
        found, passed_over = newest_sound(path / "checkpoints", world)
        if passed_over:
            raise passed_over[0]
        if found is not None:
            return found
    return open_checkpoint(path, world)


def _checkpoint_folder(damaged: Path) -> Path:
    """The checkpoint that an error is about: it names the folder, or a file in it."""
    return damaged if damaged.is_dir() else damaged.parent


def _initialize(objective: Objective, path: Path, world: World, ignore: Sequence[str]) -> tuple[str, ...]:
    """Takes the encoder whole, and of the rest what has the same name and shape; says what it did not take.

    Momentum teachers are not taken: they start as the weights that they follow, as they do from scratch.
    """

    def read() -> tuple[Mapping[str, Tensor], list[str]]:
        stored, ignored = _without_ignored(objective, _weights(path, world), ignore, path)
        _refuse_other_encoder(objective, stored, path)
        return stored, ignored

    stored, ignored = agree(read)
    followers = momentum_teachers(objective)
    whole = objective.state_dict()
    own = {name: tensor for name, tensor in whole.items() if not name.startswith(tuple(followers))}
    taken = {name for name in own.keys() & stored.keys() if own[name].shape == stored[name].shape}
    refuse_locked_at_random(objective, taken)
    objective.load_state_dict({**whole, **{name: stored[name] for name in taken}})
    for target, online in followers.values():
        target.load_state_dict(online.state_dict())
    follow = [f"as the weights that they follow: {', '.join(name[:-1] for name in followers)}"] if followers else []
    left_out = [note_on_ignored(ignored)] if ignored else []
    return (
        f"taken from {path}: {_listed(taken)}",
        f"new, as initialized: {_listed(own.keys() - taken)}",
        f"left behind: {_listed(stored.keys() - taken)}",
        *left_out,
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
    follow = tuple(momentum_teachers(objective))
    locked = {name for name, p in objective.named_parameters() if not p.requires_grad and not name.startswith(follow)}
    if random := locked - set(taken):
        problem = (
            "init_from: expected weights for all that the objective locks, found none for "
            f"{_listed(random)}. Give a run, checkpoint or folder that has them, or lock less."
        )
        raise RecipeError("the start", [problem])


def momentum_teachers(objective: Objective) -> dict[str, tuple[nn.Module, nn.Module]]:
    """Finds momentum teachers and the modules that they follow, by the beginning of a teacher's tensor names."""
    names = {module: name for name, module in objective.named_modules()}
    teachers = objective.teachers(Progress(0, 1, 0))
    return {f"{names[target]}.": (target, online) for target, online, _ in teachers}


def _weights(path: Path, world: World) -> Mapping[str, Tensor]:
    """Reads parameters and buffers, by the objective's names, of a run, a checkpoint, an encoder folder or a file."""
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


def _without_ignored(
    objective: nn.Module, stored: Mapping[str, Tensor], ignore: Sequence[str], path: Path
) -> tuple[dict[str, Tensor], list[str]]:
    """Leaves out what patterns name beyond the encoder's tensors, by names without `encoder.`; blocks are joined."""
    own = [name.removeprefix(_ENCODER) for name in objective.state_dict() if name.startswith(_ENCODER)]
    theirs = {name.removeprefix(_ENCODER): t for name, t in stored.items() if name.startswith(_ENCODER)}
    kept, ignored = without_ignored(joined_chunks(theirs, own), own, ignore, option="init_ignore", where=str(path))
    rest = {name: t for name, t in stored.items() if not name.startswith(_ENCODER)}
    return {**rest, **{f"{_ENCODER}{name}": t for name, t in kept.items()}}, ignored


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
            fix="Give the recipe the model that the weights were trained with."
            + (f" What is unknown and none of the encoder's is left out by {_patterns(unknown)}." if unknown else ""),
        )  # fmt: skip


def _patterns(unknown: Collection[str]) -> str:
    found = first_parts([name.removeprefix(_ENCODER) for name in unknown])
    return f"init_ignore: [{', '.join(json.dumps(pattern) for pattern in found)}]"


def _listed(names: set[str]) -> str:
    """Counts names by their first part: "150 of encoder, 2 of head"."""
    parts: dict[str, int] = {}
    for name in names:
        part = name.split(".")[0]
        parts[part] = parts.get(part, 0) + 1
    return ", ".join(f"{count} of {part}" for part, count in sorted(parts.items())) or "nothing"
