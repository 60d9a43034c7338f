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
import shutil
import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from data_pipeline.durable import sync_folder
from data_pipeline.errors import PretrainError, RunError, StorageError
from pretrain.checkpoints.files import FORMAT, STATE
from pretrain.checkpoints.shares import Share, Snapshot, put_verified
from pretrain.engine.training_state import Fragment
from pretrain.runtime.agreement import RanksFailedError, agree
from pretrain.runtime.collectives import World, gather_objects, side_group
from pretrain.runtime.run_folder import COMPLETE, all_folders, complete_checkpoints, folder_name
from pretrain.runtime.state import RunState


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
        say: receives a sentence on how a save went, on rank 0.
        unsound: complete checkpoints that were found damaged: they count as torn, and go with the next that is
            saved.
        exported: called on rank 0, in the thread, with each complete checkpoint.
        auxiliary: live views of what is saved with it, trained beside the objective.
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
        auxiliary: Sequence[Fragment] = (),
        max_failures: int = 3,
    ) -> None:
        self._folder, self._trained, self._world, self._keep_last = folder, trained, world, keep_last
        self._say, self._unsound, self._exported = say, set(unsound), exported
        self._auxiliary = tuple(auxiliary)
        self._failures, self._max_failures = 0, max_failures
        self._group = side_group()
        self._snapshot = Snapshot()
        self._thread: threading.Thread | None = None
        self._outcome: _Outcome | None = None

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.abandon()

    def save(self, state: RunState) -> None:
        """Takes a copy of the state and writes `step_XXXXXXXX` behind the caller's back.

        Waits for the save before, if that is still being written.

        Raises:
            RunError: too many saves have failed in a row; the same on every rank.
        """
        self._settle()
        self._snapshot.gather([*self._trained.fragments(), *self._auxiliary], self._world)
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
        share = Share(path.name, self._snapshot.shapes)
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
        """Every rank does its part; returns what went wrong on any of them, the same on all ranks."""
        try:
            agree(work, self._group)
        except RanksFailedError as error:
            return str(error)
        except StorageError as error:
            return f"{error.found}: {error.where}"
        except PretrainError as error:
            return f"{type(error).__name__}: {error}"
        return ""

    def _make_folder(self, target: Path) -> None:
        if self._world.is_main:
            _remove(target)
            target.mkdir(parents=True)

    def _mark_complete(self, target: Path, described: dict[str, Any], shares: Sequence[Share]) -> None:
        if not self._world.is_main:
            return
        shapes = {name: shape for share in shares for name, shape in share.shapes.items()}
        text = json.dumps({**described, "shapes": shapes}, indent=1).encode()
        put_verified(target / STATE, text)
        digests = {share.name: share.sha256 for share in shares} | {STATE: hashlib.sha256(text).hexdigest()}
        put_verified(target / COMPLETE, json.dumps(digests, indent=1).encode())
        sync_folder(target.parent)

    def _after(self, target: Path) -> None:
        if self._world.is_main:
            _retain(self._folder, target, self._keep_last, self._unsound)
            self._exported(target)


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
