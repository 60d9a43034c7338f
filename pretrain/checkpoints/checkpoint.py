"""How a checkpoint is found, opened and loaded again. Its files: files.py; how they are written: writer.py."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from data_pipeline.errors import CheckpointError, RunError
from pretrain.checkpoints.files import AUXILIARY_PREFIX, State, Tensors, read_state_file, some, unreadable, verify_files
from pretrain.runtime.agreement import agree
from pretrain.runtime.collectives import World, from_main, gather_objects
from pretrain.runtime.run_folder import COMPLETE as COMPLETE
from pretrain.runtime.run_folder import all_folders as all_folders
from pretrain.runtime.run_folder import complete_checkpoints as complete_checkpoints
from pretrain.runtime.run_folder import folder_name as folder_name
from pretrain.runtime.run_folder import sha256_of
from pretrain.runtime.state import RunState

if TYPE_CHECKING:
    from pretrain.engine.training_state import Fragment, TrainingState


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint whose every byte was compared with its hash."""

    path: Path
    state: State
    tensors: Tensors

    def close(self) -> None:
        """Lets go of its files; no tensor can be read any more."""
        self.tensors.close()


def open_checkpoint(path: Path, world: World) -> Checkpoint:
    """Compares every file with its hash, the ranks sharing the reading; every rank calls it.

    Raises:
        CheckpointError: torn or damaged; the same on every rank, also on those that found nothing.
        RunError: it could not be read, which says nothing about what it holds; or ranks see different ones.
    """

    def open_here() -> tuple[Checkpoint, str]:
        verify_files(path, world)
        try:
            return Checkpoint(path, read_state_file(path), Tensors(path)), sha256_of(path / COMPLETE)
        except OSError as error:
            raise unreadable(path / COMPLETE, error) from None

    opened, seen = agree(open_here)
    if len(set(gather_objects(seen))) > 1:
        raise RunError(
            where=str(path), expected="the same checkpoint on every rank", found="others of this name",
            fix="Let all ranks see one folder, and its newest state.",
        )  # fmt: skip
    return opened


def newest_sound(folder: Path, world: World) -> tuple[Checkpoint | None, list[CheckpointError]]:
    """The newest complete checkpoint that is sound, and why newer ones were passed over; every rank calls it.

    Raises:
        CheckpointError: there are complete ones, and none is sound: starting again would lose the run silently.
        RunError: one could not be read; it may be sound.
    """
    passed_over: list[CheckpointError] = []
    for path in reversed(from_main(complete_checkpoints(folder))):
        try:
            return open_checkpoint(path, world), passed_over
        except CheckpointError as error:
            passed_over.append(error)
    if passed_over:
        raise CheckpointError(
            where=str(folder), expected="one sound checkpoint among the complete ones",
            found="; ".join(f"{error.where}: {error.found}" for error in passed_over),
            fix="Restore one of them from a copy, or remove the folder to start the run from scratch.",
        )  # fmt: skip
    return None, passed_over


def read_state(path: Path) -> RunState:
    """Reads progress and counters of a checkpoint, without a look at its tensors."""
    return read_state_file(path).run_state()


def load(checkpoint: Checkpoint, trained: TrainingState) -> RunState:
    """Brings a whole training state back, whatever world size and ZeRO stage wrote it. Every rank calls it.

    Raises:
        CheckpointError: its tensors are not exactly those of this state; the same on every rank, and nothing
            was changed.
    """
    fragments = trained.fragments()
    wanted = {fragment.name: (fragment.shape, str(fragment.data.dtype)) for fragment in fragments}
    _refuse_partial(checkpoint, wanted, [str(group["name"]) for group in trained.group_values()])
    for fragment in fragments:
        fragment.data.copy_(checkpoint.tensors.read(fragment.name, fragment.start, fragment.data.numel()))
    trained.after_load([group.model_dump() for group in checkpoint.state.groups])
    return checkpoint.state.run_state()


def load_auxiliary(checkpoint: Checkpoint, fragments: Sequence[Fragment]) -> bool:
    """Brings back the replicated state of what was trained beside the objective: all of it, or nothing.

    Returns:
        Whether the checkpoint has exactly these tensors; else nothing was changed.
    """
    stored = checkpoint.tensors
    kept = {
        name: (shape, stored.dtype(name)) for name, shape in stored.shapes.items() if name.startswith(AUXILIARY_PREFIX)
    }
    if kept != {fragment.name: (fragment.shape, str(fragment.data.dtype)) for fragment in fragments}:
        return False
    for fragment in fragments:
        fragment.data.copy_(stored.read(fragment.name, 0, fragment.data.numel()))
    return True


def module_state(path: Path, prefix: str = "", *, verified: bool = False) -> dict[str, Tensor]:
    """Reads the parameters and buffers, or their moving averages, whose names begin with `prefix`, which is cut off.

    Args:
        path: a complete checkpoint; read by this process alone.
        prefix: "encoder." for the encoder.
        verified: its files were compared with their hashes by the caller.

    Raises:
        CheckpointError: torn, damaged, or nothing has that prefix.
    """
    if not verified:
        verify_files(path, World())
    stored = Tensors(path)
    found = {}
    for kind in ("param/", "buffer/", "ema/"):  # an average takes the place of what it is of
        for name in stored.shapes:
            if name.startswith(kind + prefix):
                found[name.removeprefix(kind + prefix)] = stored.whole(name)
    if not found:
        raise CheckpointError(
            where=str(path), expected=f"parameters named {prefix}...",
            found=f"{len(stored.shapes)} others, such as {next(iter(stored.shapes), 'none')!r}",
            fix="Check that it is a checkpoint of a run with this objective.",
        )  # fmt: skip
    return found


def digests(path: Path) -> dict[str, str]:
    """SHA-256 of every logical tensor, and of the parameter groups: equal states have equal digests."""
    stored = Tensors(path)
    found = {}
    for name in sorted(stored.shapes):
        tensor = stored.whole(name)
        head = f"{tensor.dtype}{tuple(tensor.shape)}".encode()
        found[name] = hashlib.sha256(
            head + tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        ).hexdigest()
    groups = json.dumps([group.model_dump() for group in read_state_file(path).groups], sort_keys=True)
    return {**found, "groups": hashlib.sha256(groups.encode()).hexdigest()}


def _refuse_partial(
    checkpoint: Checkpoint, wanted: dict[str, tuple[tuple[int, ...], str]], group_names: list[str]
) -> None:
    """Every rank names its own fragments: a stored tensor that no rank asks for is as wrong as a missing one."""
    everything: dict[str, tuple[tuple[int, ...], str]] = {}
    for found in gather_objects(wanted):
        everything |= found
    stored = checkpoint.tensors
    names = {name for name in stored.shapes if not name.startswith(AUXILIARY_PREFIX)}
    missing = sorted(everything.keys() - names)
    unknown = sorted(names - everything.keys())
    both = everything.keys() & names
    other = sorted(n for n in both if everything[n] != (stored.shapes[n], stored.dtype(n)))
    if missing or unknown or other:
        raise CheckpointError(
            where=str(checkpoint.path), expected="exactly this run's tensors",
            found=f"missing {some(missing)}; unknown {some(unknown)}; of another shape {some(other)}",
            fix="Resume with the recipe that wrote it, or take the weights alone with init_from.",
        )  # fmt: skip
    stored_groups = [group.name for group in checkpoint.state.groups]
    if stored_groups != group_names:
        raise CheckpointError(
            where=str(checkpoint.path), expected=f"the parameter groups {some(group_names)}",
            found=some(stored_groups), fix="Resume with the recipe that wrote it.",
        )  # fmt: skip
