"""How a checkpoint becomes durable: copied at a step boundary, written behind the training's back.

What training waits for is one copy of this rank's share into a buffer that is used again and again. A thread of
each rank then writes it, and the threads agree over a process group of their own:

1. rank 0 makes a fresh folder;
2. each rank writes its share, flushes it to the disk, reads it back and compares hashes;
3. when all hashes have arrived, rank 0 writes state.json and, last of all and by a rename, COMPLETE;
4. older checkpoints go.

Whatever fails on the way, on whichever rank, nothing claims to be complete, and all ranks know.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Protocol

import torch

from data_pipeline.durable import durable_file, sync_folder
from data_pipeline.errors import RunError
from pretrain.checkpoints.checkpoint import COMPLETE, FORMAT, STATE, all_folders, complete_checkpoints, folder_name
from pretrain.engine.training_state import Fragment
from pretrain.runtime.collectives import World, gather_objects, side_group
from pretrain.runtime.run_folder import sha256_of
from pretrain.runtime.state import RunState

_CHUNK = 1 << 24  # bytes that are written and hashed at a time
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}  # as safetensors calls them


class HoldsState(Protocol):
    """What a checkpoint is taken of, laid out for a ZeRO stage."""

    @property
    def stage(self) -> int: ...
    def fragments(self) -> list[Fragment]: ...
    def group_values(self) -> list[dict[str, Any]]: ...


@dataclass(frozen=True)
class _Outcome:
    """The same on every rank. A checkpoint may be complete, and what was to follow have failed."""

    path: Path
    error: str = ""
    complete: bool = False
    alone: bool = False  # the ranks could not agree: this is what one of them knows


class CheckpointWriter:
    """Saves states of a run, one at a time; every rank has one and calls its methods at the same steps.

    Args:
        folder: where the checkpoints of the run lie.
        trained: what is saved.
        world: this process among the ranks.
        keep_last: complete checkpoints that are kept.
        say: told what came of a save; on rank 0.
        unsound: complete checkpoints that were found damaged: they count as torn, and go with the next that is
            saved.
        exported: called on rank 0, in the thread, with each complete checkpoint.
        beside: live views of what is saved with it.
        max_failures: saves that may fail one after the other before the run stops.
    """

    def __init__(
        self,
        folder: Path,
        trained: HoldsState,
        *,
        world: World,
        keep_last: int,
        say: Callable[[str], None],
        unsound: Collection[Path] = (),
        exported: Callable[[Path], None] = lambda _: None,
        beside: Sequence[Fragment] = (),
        max_failures: int = 3,
    ) -> None:
        self._folder, self._trained, self._world, self._keep_last = folder, trained, world, keep_last
        self._say, self._unsound, self._exported = say, set(unsound), exported
        self._beside = tuple(beside)
        self._failures, self._max_failures = 0, max_failures
        self._group = side_group()
        self._snapshot = _Snapshot()
        self._thread: threading.Thread | None = None
        self._outcome: _Outcome | None = None

    def save(self, state: RunState) -> None:
        """Takes a copy of the state and writes `step_XXXXXXXX` behind the caller's back.

        Waits for the save before, if that is still being written.

        Raises:
            RunError: too many saves have failed in a row; told alike on every rank.
        """
        self._settle()
        self._snapshot.gather([*self._trained.fragments(), *self._beside], self._world)
        described = {
            "format": FORMAT,
            "run": state.to_json(),
            "groups": self._trained.group_values(),
            "written_by": {"world_size": self._world.size, "zero_stage": self._trained.stage},
        }
        target = self._folder / folder_name(state.progress.step)
        self._thread = threading.Thread(target=self._run, args=(target, described), name="checkpoint", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Waits for the last save.

        Raises:
            RunError: it failed, so that what was trained since the one before is in no checkpoint.
        """
        outcome = self._settle()
        if outcome is not None and outcome.error:
            raise self._failed(outcome)

    def abandon(self, seconds: float = 60.0) -> None:
        """Gives a save that is under way the time to end, on a run that has failed."""
        if self._thread is not None:
            self._thread.join(seconds)

    def _settle(self) -> _Outcome | None:
        """The end of the save before; counted here, where every rank is at the same step."""
        if self._thread is None:
            return None
        self._thread.join()
        self._thread = None
        outcome = self._outcome
        assert outcome is not None
        if outcome.alone:
            raise self._failed(outcome)
        self._failures = 0 if outcome.complete else self._failures + 1
        if self._failures >= self._max_failures:
            raise self._failed(outcome)
        return outcome

    def _failed(self, outcome: _Outcome) -> RunError:
        complete = complete_checkpoints(self._folder)
        newest = f"{complete[-1].name}, which is untouched" if complete else "none yet"
        return RunError(
            where=str(outcome.path), expected="a checkpoint, its export and room for the next", found=outcome.error,
            fix=f"The newest complete checkpoint is {newest}. Free space or mend the storage, then start again.",
        )  # fmt: skip

    def _run(self, target: Path, described: dict[str, Any]) -> None:
        try:
            self._outcome = self._write(target, described)
        except Exception as error:  # of the agreeing itself: a rank is gone, and the main thread will hear of it
            self._outcome = _Outcome(target, f"{type(error).__name__}: {error}", alone=True)
        if self._world.is_main:
            what = "saved" if self._outcome.complete else "NOT saved:"
            self._say(f"{what} {target}{f' ({self._outcome.error})' if self._outcome.error else ''}")

    def _write(self, target: Path, described: dict[str, Any]) -> _Outcome:
        problems = self._agree(lambda: self._make_folder(target))
        if problems:
            return _Outcome(target, problems)
        path = target / f"tensors-{self._world.rank:05d}-of-{self._world.size:05d}.safetensors"
        share = _Share(path.name, self._snapshot.shapes)
        problems = self._agree(lambda: share.write(path, self._snapshot))
        shares = gather_objects(share, self._group)
        if not problems:
            problems = self._agree(lambda: self._mark_complete(target, described, shares))
        if problems:
            self._agree(lambda: _remove(target) if self._world.is_main else None)
            return _Outcome(target, problems)
        problems = self._agree(lambda: self._after(target))
        return _Outcome(target, problems, complete=True)

    def _agree(self, work: Callable[[], None]) -> str:
        """Every rank does its part; what went wrong on any of them, on all of them."""
        problem = ""
        try:
            work()
        except Exception as error:  # told to every rank, so that none waits for this one
            problem = f"{type(error).__name__}: {error}"
        problems = gather_objects(problem, self._group)
        return "; ".join(f"rank {rank}: {problem}" for rank, problem in enumerate(problems) if problem)

    def _make_folder(self, target: Path) -> None:
        if self._world.is_main:
            _remove(target)
            target.mkdir(parents=True)

    def _mark_complete(self, target: Path, described: dict[str, Any], shares: Sequence[_Share]) -> None:
        if not self._world.is_main:
            return
        shapes = {name: shape for share in shares for name, shape in share.shapes.items()}
        text = json.dumps({**described, "shapes": shapes}, indent=1).encode()
        _put(target / STATE, text)
        digests = {share.name: share.sha256 for share in shares} | {STATE: hashlib.sha256(text).hexdigest()}
        _put(target / COMPLETE, json.dumps(digests, indent=1).encode())
        sync_folder(target.parent)

    def _after(self, target: Path) -> None:
        if self._world.is_main:
            _retain(self._folder, target, self._keep_last, self._unsound)
            self._exported(target)


class _Snapshot:
    """This rank's share of a state in one piece of memory, as safetensors lays it out; kept for the next save."""

    def __init__(self) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._header = b""
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._num_bytes = 0

    def gather(self, fragments: Sequence[Fragment], world: World) -> None:
        """Copies the stretches that this rank alone keeps, and its part of those that every rank has."""
        shared = [f for f in fragments if f.replicated]  # alike on every rank, and in one order; the others are not
        own = [f for f in fragments if not f.replicated] + shared[world.rank :: world.size]
        own.sort(key=lambda fragment: -fragment.data.itemsize)  # each type is then aligned to its own size
        self.shapes = {fragment.name: fragment.shape for fragment in own}
        offsets = list(accumulate((fragment.data.nbytes for fragment in own), initial=0))
        places = {
            f"{fragment.name}@{fragment.start}": {
                "dtype": _DTYPES[fragment.data.dtype],
                "shape": [fragment.data.numel()],
                "data_offsets": [start, stop],
            }
            for fragment, (start, stop) in zip(own, pairwise(offsets), strict=True)
        }
        header = json.dumps(places).encode()
        header += b" " * (-len(header) % 8)
        self._header = len(header).to_bytes(8, "little") + header
        self._num_bytes = offsets[-1]
        on_gpu = any(fragment.data.is_cuda for fragment in own)
        if self._buffer.numel() < self._num_bytes:
            self._buffer = torch.empty(self._num_bytes, dtype=torch.uint8, pin_memory=on_gpu)
        for fragment, (start, stop) in zip(own, pairwise(offsets), strict=True):
            view = self._buffer[start:stop].view(fragment.data.dtype)
            view.copy_(fragment.data.detach(), non_blocking=on_gpu)
        if on_gpu:
            torch.cuda.synchronize()

    def pieces(self) -> list[memoryview]:
        """The bytes of the file, in order."""
        body = memoryview(self._buffer.numpy().data)[: self._num_bytes]
        return [memoryview(self._header), *(body[at : at + _CHUNK] for at in range(0, len(body), _CHUNK))]


@dataclass
class _Share:
    """What one rank wrote."""

    name: str
    shapes: dict[str, tuple[int, ...]]
    sha256: str = ""

    def write(self, path: Path, snapshot: _Snapshot) -> None:
        """Raises OSError where the disk does not take it, or does not give back what it took."""
        digest = hashlib.sha256()
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            for piece in snapshot.pieces():
                digest.update(piece)
                _write_all(descriptor, piece)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)  # so that the disk is read, not the cache
        finally:
            os.close(descriptor)
        self.sha256 = digest.hexdigest()
        _compare(path, self.sha256)


def _write_all(descriptor: int, piece: memoryview) -> None:
    while piece:
        piece = piece[os.write(descriptor, piece) :]


def _compare(path: Path, sha256: str) -> None:
    if sha256_of(path) != sha256:
        raise OSError(f"{path.name} does not give back what was written")


def _put(path: Path, data: bytes) -> None:
    """Read back before it appears under its name, and once it has: a rename can be lost as well as a byte."""
    with durable_file(path) as file:
        file.write(data)
        file.flush()
        file.seek(0)
        _refuse_other(path, file.read(), data)
    _refuse_other(path, path.read_bytes() if path.exists() else b"", data)


def _refuse_other(path: Path, found: bytes, written: bytes) -> None:
    if found != written:
        raise OSError(f"{path.name} does not give back what was written")


def _retain(folder: Path, newest: Path, keep_last: int, unsound: Collection[Path]) -> None:
    """Torn and unsound checkpoints never count as kept ones, and go."""
    sound = [path for path in complete_checkpoints(folder) if path == newest or path not in unsound]
    for path in all_folders(folder):
        if path not in {*sound[-keep_last:], newest}:
            _remove(path)


def _remove(path: Path) -> None:
    """COMPLETE first, so that half a removal claims nothing."""
    if path.exists():
        (path / COMPLETE).unlink(missing_ok=True)
        shutil.rmtree(path)
