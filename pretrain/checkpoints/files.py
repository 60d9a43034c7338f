"""The files of a checkpoint: their names and layout, their hashes, and the tensors in them.

A checkpoint is a folder of logical tensors by parameter name, so that any world size and any ZeRO stage loads it:

    step_00001000/
      tensors-00000-of-00002.safetensors    the stretches that rank 0 kept: `<name>@<first element>`, flat
      state.json                            progress, shapes of the logical tensors, parameter groups
      COMPLETE                              SHA-256 of every file; written last, its presence makes the checkpoint

Names are `param/<parameter>`, `ema/<parameter>`, `optim/<key>/<parameter>` and `buffer/<buffer>`, which a run loads
whole or not at all; and `probe/<tensor>` of the online probe, which may come and go.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data_pipeline.errors import CheckpointError, PretrainError, RunError
from data_pipeline.messages import short_list
from pretrain.runtime.collectives import World
from pretrain.runtime.run_folder import COMPLETE, sha256_of
from pretrain.runtime.state import Progress, RunState

FORMAT = 1
STATE = "state.json"
AUXILIARY_PREFIX = "probe/"  # begins the names of what is trained beside the objective and is no part of the training

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
    """The contents of `state.json`: all of a checkpoint that is no tensor."""

    model_config = ConfigDict(extra="forbid", strict=True)
    format: Literal[1]
    run: _Run
    groups: list[_Group]
    shapes: dict[str, list[Count]]
    written_by: dict[str, int]

    def run_state(self) -> RunState:
        """Progress and counters as the loop has them."""
        counts = self.run.model_dump(exclude={"progress"})
        return RunState(Progress(**self.run.progress.model_dump()), **counts)


_Digests = TypeAdapter(dict[str, Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]])


class Tensors:
    """The logical tensors of a checkpoint, read out of the stretches that its ranks wrote.

    Attributes:
        shapes: of the logical tensors, by name.
    """

    def __init__(self, path: Path) -> None:
        self.shapes = {name: tuple(shape) for name, shape in read_state_file(path).shapes.items()}
        self._stretches: dict[str, list[tuple[int, int, Any, str]]] = defaultdict(list)
        self._where = path
        for file_path in sorted(path.glob("tensors-*.safetensors")):
            self._list_stretches(file_path)
        for stretches in self._stretches.values():
            stretches.sort(key=lambda stretch: stretch[:2])

    def dtype(self, name: str) -> str:
        """The type of a logical tensor as torch writes it; "none" where no stretch of it is stored."""
        stretches = self._stretches[name]
        if not stretches:
            return "none"
        _, _, file, key = stretches[0]
        return str(file.get_slice(key)[:0].dtype)

    def read(self, name: str, start: int, numel: int) -> Tensor:
        """Reads the elements [start, start + numel) of a flattened logical tensor."""
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
        """Reads a logical tensor in its shape."""
        shape = self.shapes[name]
        numel = 1
        for side in shape:
            numel *= side
        return self.read(name, 0, numel).view(shape)

    def close(self) -> None:
        """Lets go of the files; no tensor can be read any more."""
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
    """The error for a part of a checkpoint that holds something else than was written."""
    return CheckpointError(
        where=str(path), expected="an undamaged part of a checkpoint", found=found, fix="Choose another checkpoint."
    )


def unreadable(path: Path, error: OSError) -> PretrainError:
    """The error for a file that was not read: one that is missing is damage, one that storage refuses may be sound."""
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return damaged(path, "no such file")
    return RunError(
        where=str(path), expected="a file that can be read", found=error.strerror or str(error),
        fix="Mend the storage and start again; nothing was changed.",
    )  # fmt: skip


def verify_files(path: Path, world: World) -> None:
    """Compares all files with the hashes in COMPLETE; each rank reads a part of them.

    Raises:
        CheckpointError: this rank found the checkpoint torn or damaged.
        RunError: this rank could not read it.
    """
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


def read_state_file(path: Path) -> State:
    """Reads `state.json` of a checkpoint."""
    try:
        return State.model_validate_json((path / STATE).read_bytes())
    except OSError as error:
        raise unreadable(path / STATE, error) from None
    except (ValidationError, ValueError) as error:
        raise damaged(path / STATE, _brief(error)) from None


def some(names: Iterable[str]) -> str:
    """A few of the names, for a message."""
    return short_list(list(names), 5) or "none"


def _brief(error: Exception) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__
