"""What is saved, how it is found and loaded again; how it is written: checkpoint_writer.py.

A checkpoint is a folder of logical tensors by parameter name, so that any world size and any ZeRO stage loads it:

    step_00001000/
      tensors-00000-of-00002.safetensors    the stretches that rank 0 kept: `<name>@<first element>`, flat
      state.json                            progress, shapes of the logical tensors, parameter groups
      COMPLETE                              SHA-256 of every file; written last, its presence makes the checkpoint

Names are `param/<parameter>`, `ema/<parameter>`, `optim/<key>/<parameter>` and `buffer/<buffer>`, which a run loads
whole or not at all; and `probe/<tensor>` of what is trained beside the objective, which may come and go.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data_pipeline.errors import CheckpointError, PretrainError, RunError
from pretrain.runtime.collectives import World, from_main, gather_objects
from pretrain.runtime.run_folder import COMPLETE as COMPLETE
from pretrain.runtime.run_folder import all_folders as all_folders
from pretrain.runtime.run_folder import complete_checkpoints as complete_checkpoints
from pretrain.runtime.run_folder import folder_name as folder_name
from pretrain.runtime.run_folder import sha256_of
from pretrain.runtime.state import Progress, RunState

if TYPE_CHECKING:
    from pretrain.engine.training_state import Fragment, TrainingState

FORMAT = 1
STATE = "state.json"
BESIDE = "probe/"  # what names begin with that are no part of the training

Count = Annotated[int, Field(ge=0, lt=2**62)]


class _Progress(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    step: Count
    total_steps: Count
    samples_seen: Count


class _Run(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    progress: _Progress
    cursor: Count
    skipped_steps: Count
    bad_samples: Count


class _Group(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)
    name: str
    step: float


class State(BaseModel):
    """`state.json`: all of a checkpoint that is no tensor."""

    model_config = ConfigDict(extra="forbid", strict=True)
    format: Literal[1]
    run: _Run
    groups: list[_Group]
    shapes: dict[str, list[Count]]
    written_by: dict[str, int]

    def run_state(self) -> RunState:
        counts = self.run.model_dump(exclude={"progress"})
        return RunState(Progress(**self.run.progress.model_dump()), **counts)


_Digests = TypeAdapter(dict[str, Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]])


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
        CheckpointError: torn or damaged; told alike on every rank, also by those that found nothing.
        RunError: it could not be read, which says nothing of what it holds; or ranks see different ones.
    """
    problem: PretrainError | None = None
    try:
        _verify(path, world)
        opened = Checkpoint(path, _read_state(path), Tensors(path))
        seen = sha256_of(path / COMPLETE)
    except PretrainError as error:
        problem, seen = error, ""
    for found, other in (answers := gather_objects((problem, seen))):
        if found is not None:
            raise found
        if other != answers[0][1]:
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
    """Progress and counters of a checkpoint, without a look at its tensors."""
    return _read_state(path).run_state()


def load(checkpoint: Checkpoint, trained: TrainingState) -> RunState:
    """Brings a whole training state back, whatever world size and ZeRO stage wrote it. Every rank calls it.

    Raises:
        CheckpointError: its tensors are not exactly those of this state; told alike on every rank, and nothing
            was changed.
    """
    fragments = trained.fragments()
    wanted = {fragment.name: (fragment.shape, str(fragment.data.dtype)) for fragment in fragments}
    _refuse_partial(checkpoint, wanted, [str(group["name"]) for group in trained.group_values()])
    for fragment in fragments:
        fragment.data.copy_(checkpoint.tensors.read(fragment.name, fragment.start, fragment.data.numel()))
    trained.after_load([group.model_dump() for group in checkpoint.state.groups])
    return checkpoint.state.run_state()


def load_beside(checkpoint: Checkpoint, fragments: Sequence[Fragment]) -> bool:
    """Brings back what was trained beside the objective, and is replicated: all of it, or nothing.

    Returns:
        Whether the checkpoint has exactly these tensors; else nothing was changed.
    """
    stored = checkpoint.tensors
    kept = {name: (shape, stored.dtype(name)) for name, shape in stored.shapes.items() if name.startswith(BESIDE)}
    if kept != {fragment.name: (fragment.shape, str(fragment.data.dtype)) for fragment in fragments}:
        return False
    for fragment in fragments:
        fragment.data.copy_(stored.read(fragment.name, 0, fragment.data.numel()))
    return True


def module_state(path: Path, prefix: str = "", *, verified: bool = False) -> dict[str, Tensor]:
    """Parameters and buffers, or their moving averages, whose names begin with `prefix`, which is cut off.

    Args:
        path: a complete checkpoint; read by this process alone.
        prefix: "encoder." for the encoder.
        verified: its files were compared with their hashes by the caller.

    Raises:
        CheckpointError: torn, damaged, or nothing has that prefix.
    """
    if not verified:
        _verify(path, World())
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
    groups = json.dumps([group.model_dump() for group in _read_state(path).groups], sort_keys=True)
    return {**found, "groups": hashlib.sha256(groups.encode()).hexdigest()}


class Tensors:
    """Logical tensors read out of the stretches that ranks wrote."""

    def __init__(self, path: Path) -> None:
        self.shapes = {name: tuple(shape) for name, shape in _read_state(path).shapes.items()}
        self._stretches: dict[str, list[tuple[int, int, Any, str]]] = defaultdict(list)
        self._where = path
        for file_path in sorted(path.glob("tensors-*.safetensors")):
            self._list_stretches(file_path)
        for stretches in self._stretches.values():
            stretches.sort(key=lambda stretch: stretch[:2])

    def dtype(self, name: str) -> str:
        """As torch writes it; "none" where no stretch of it is stored."""
        stretches = self._stretches[name]
        if not stretches:
            return "none"
        _, _, file, key = stretches[0]
        return str(file.get_slice(key)[:0].dtype)

    def read(self, name: str, start: int, numel: int) -> Tensor:
        """Elements [start, start + numel) of a flattened logical tensor."""
        pieces, at, end = [], start, start + numel
        for first, last, file, key in self._stretches[name]:
            if first <= at < last and at < end:
                until = min(last, end)
                pieces.append(file.get_slice(key)[at - first : until - first])
                at = until
        if numel == 0:
            return torch.empty(0)
        if at != end or len({piece.dtype for piece in pieces}) != 1:
            raise damaged(self._where, f"element {at} of {name} in no file")
        return torch.cat(pieces) if len(pieces) > 1 else pieces[0]

    def whole(self, name: str) -> Tensor:
        shape = self.shapes[name]
        numel = 1
        for side in shape:
            numel *= side
        return self.read(name, 0, numel).view(shape)

    def close(self) -> None:
        self._stretches.clear()

    def _list_stretches(self, path: Path) -> None:
        try:
            file = safe_open(path, framework="pt")
            for key in file.keys():  # type: ignore[no-untyped-call]  # noqa: SIM118
                name, _, start = key.rpartition("@")
                (numel,) = file.get_slice(key).get_shape()  # type: ignore[no-untyped-call]
                self._stretches[name].append((int(start), int(start) + numel, file, key))
        except (SafetensorError, ValueError) as error:
            raise damaged(path, str(error)) from None
        except OSError as error:
            raise unreadable(path, error) from None


def damaged(path: Path, found: str) -> CheckpointError:
    return CheckpointError(
        where=str(path), expected="an undamaged part of a checkpoint", found=found, fix="Choose another checkpoint."
    )


def unreadable(path: Path, error: OSError) -> PretrainError:
    """A file that is not there is damage; one that the system does not give may be sound."""
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return damaged(path, "no such file")
    return RunError(
        where=str(path), expected="a file that can be read", found=error.strerror or str(error),
        fix="Mend the storage and start again; nothing was changed.",
    )  # fmt: skip


def _verify(path: Path, world: World) -> None:
    """Hashes of all files against COMPLETE; ranks share the reading."""
    try:
        complete = sorted(_Digests.validate_json((path / COMPLETE).read_bytes()).items())
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(
            where=str(path), expected="a complete checkpoint", found=f"no {COMPLETE} in it",
            fix="It was torn while being written; choose another one.",
        ) from None  # fmt: skip
    except OSError as error:
        raise unreadable(path / COMPLETE, error) from None
    except (ValidationError, ValueError) as error:
        raise damaged(path / COMPLETE, _brief(error)) from None
    names = {name for name, _ in complete}
    present = {file.name for file in path.glob("tensors-*.safetensors")} | {STATE}
    if names != present:
        raise damaged(path / COMPLETE, f"it lists {some(names - present)} too many and lacks {some(present - names)}")
    for name, digest in complete[world.rank :: world.size]:
        try:
            found = sha256_of(path / name)
        except OSError as error:
            raise unreadable(path / name, error) from None
        if found != digest:
            raise damaged(path / name, "other bytes than were written (SHA-256 differs)")


def _read_state(path: Path) -> State:
    try:
        return State.model_validate_json((path / STATE).read_bytes())
    except OSError as error:
        raise unreadable(path / STATE, error) from None
    except (ValidationError, ValueError) as error:
        raise damaged(path / STATE, _brief(error)) from None


def _refuse_partial(
    checkpoint: Checkpoint, wanted: dict[str, tuple[tuple[int, ...], str]], group_names: list[str]
) -> None:
    """Every rank names its own fragments; a stored tensor that no rank asks for is as wrong as a missing one."""
    everything: dict[str, tuple[tuple[int, ...], str]] = {}
    for found in gather_objects(wanted):
        everything |= found
    stored = checkpoint.tensors
    names = {name for name in stored.shapes if not name.startswith(BESIDE)}
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


def some(names: Iterable[str]) -> str:
    """A few of the names, for a message."""
    names = list(names)
    return (", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")) or "none"


def _brief(error: Exception) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__
