"""What is saved, how it becomes durable, how it is found and loaded again.

A checkpoint is a folder of logical tensors by parameter name, so that any world size and any ZeRO stage loads it:

    step_00001000/
      tensors-00000-of-00002.safetensors    the stretches that rank 0 kept: `<name>@<first element>`, flat
      state.json                            progress, shapes of the logical tensors, parameter groups
      COMPLETE                              SHA-256 of every file; written last, its presence makes the checkpoint

Names are `param/<parameter>`, `optim/<key>/<parameter>` and `buffer/<buffer>`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from data_pipeline.errors import CheckpointError, RunError
from pretrain.collectives import World, barrier, gather_objects
from pretrain.engine import Engine
from pretrain.state import RunState

FORMAT = 1
_FOLDER = re.compile(r"step_(\d{8,})")


def save(folder: Path, engine: Engine, state: RunState, *, world: World, keep_last: int) -> Path:
    """Writes `folder/step_XXXXXXXX`; every rank calls it and writes its share.

    Returns:
        The complete checkpoint. Older complete ones beyond `keep_last` are gone, and so are torn ones.

    Raises:
        RunError: a rank could not write its share; nothing claims to be complete.
    """
    target = folder / f"step_{state.progress.step:08d}"
    if world.is_main:
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
    barrier()
    shares = gather_objects(_write_share(target, engine, world))
    failed = {share["file"]: share["error"] for share in shares if "error" in share}
    if failed:
        raise RunError(
            where=str(target), expected="every rank to write its share", found=f"failures: {failed}",
            fix="The newest complete checkpoint is untouched; free space or mend the disk, then start the run again.",
        )  # fmt: skip
    if world.is_main:
        digests = {share["file"]: share["sha256"] for share in shares}
        shapes = {name: shape for share in shares for name, shape in share["shapes"].items()}
        _write_state(target, engine, state, shapes, digests, world)
        _retain(folder, target, keep_last)
    barrier()
    return target


def complete_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints in `folder`, oldest first."""
    if not folder.is_dir():
        return []
    found = [p for p in folder.iterdir() if _FOLDER.fullmatch(p.name) and (p / "COMPLETE").is_file()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step_")))


def read_state(checkpoint: Path) -> RunState:
    """Progress and counters of a checkpoint."""
    return RunState.from_json(_state_json(checkpoint)["run"])


def load(checkpoint: Path, engine: Engine, *, world: World) -> RunState:
    """Brings a whole training state back, whatever world size and ZeRO stage wrote it. Every rank calls it.

    Raises:
        CheckpointError: damaged, or its tensors are not exactly those of this engine; told alike on every rank.
    """
    problem: CheckpointError | None = None
    try:
        _verify(checkpoint, world)
        stored = _Tensors(checkpoint)
    except CheckpointError as error:
        problem = error
    for found in gather_objects(problem):
        if found is not None:
            raise found
    described = _state_json(checkpoint)
    fragments = engine.fragments()
    _refuse_partial(checkpoint, stored, {fragment.name: fragment.shape for fragment in fragments}, world)
    for fragment in fragments:
        fragment.data.copy_(stored.read(fragment.name, fragment.start, fragment.data.numel()))
    engine.after_load(described["groups"])
    return RunState.from_json(described["run"])


def load_tensors(checkpoint: Path, prefix: str) -> dict[str, Tensor]:
    """Whole tensors whose names begin with `prefix`, which is cut off: for evaluation and export.

    Raises:
        CheckpointError: incomplete, damaged, or nothing has that prefix.
    """
    _verify(checkpoint, World())
    stored = _Tensors(checkpoint)
    names = [name for name in stored.shapes if name.startswith(prefix)]
    if not names:
        raise CheckpointError(
            where=str(checkpoint), expected=f"tensors named {prefix}...",
            found=f"{len(stored.shapes)} others, such as {next(iter(stored.shapes), 'none')!r}",
            fix="Check that it is a checkpoint of a run with this objective.",
        )  # fmt: skip
    return {name.removeprefix(prefix): stored.whole(name) for name in names}


def digests(checkpoint: Path) -> dict[str, str]:
    """SHA-256 of every logical tensor, and of the parameter groups: equal states have equal digests."""
    stored = _Tensors(checkpoint)
    found = {}
    for name in sorted(stored.shapes):
        tensor = stored.whole(name)
        head = f"{tensor.dtype}{tuple(tensor.shape)}".encode()
        found[name] = hashlib.sha256(
            head + tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        ).hexdigest()
    groups = json.dumps(_state_json(checkpoint)["groups"], sort_keys=True)
    return {**found, "groups": hashlib.sha256(groups.encode()).hexdigest()}


class _Tensors:
    """Logical tensors read out of the stretches that ranks wrote."""

    def __init__(self, checkpoint: Path) -> None:
        self.shapes = {name: tuple(shape) for name, shape in _state_json(checkpoint)["shapes"].items()}
        self._stretches: dict[str, list[tuple[int, Any, str]]] = defaultdict(list)
        self._where = checkpoint
        for path in sorted(checkpoint.glob("tensors-*.safetensors")):
            try:
                file = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise _damaged(path, str(error)) from None
            for key in file.keys():  # type: ignore[no-untyped-call]  # noqa: SIM118
                name, _, start = key.rpartition("@")
                self._stretches[name].append((int(start), file, key))
        for stretches in self._stretches.values():
            stretches.sort(key=lambda stretch: stretch[0])

    def read(self, name: str, start: int, numel: int) -> Tensor:
        """Elements [start, start + numel) of a flattened logical tensor."""
        pieces, at = [], start
        for first, file, key in self._stretches[name]:
            stored = file.get_slice(key)
            last = first + stored.get_shape()[0]
            if first <= at < last and at < start + numel:
                until = min(last, start + numel)
                pieces.append(stored[at - first : until - first])
                at = until
        if at != start + numel:
            raise _damaged(self._where, f"element {at} of {name} in no file")
        return torch.cat(pieces) if len(pieces) > 1 else pieces[0]

    def whole(self, name: str) -> Tensor:
        shape = self.shapes[name]
        numel = 1
        for side in shape:
            numel *= side
        return self.read(name, 0, numel).view(shape)


def _write_share(target: Path, engine: Engine, world: World) -> dict[str, Any]:
    """Stretches that this rank alone keeps, and its part of those that every rank has."""
    path = target / f"tensors-{world.rank:05d}-of-{world.size:05d}.safetensors"
    try:
        tensors, shapes = {}, {}
        for i, fragment in enumerate(engine.fragments()):
            if not fragment.replicated or i % world.size == world.rank:
                tensors[f"{fragment.name}@{fragment.start}"] = fragment.data.detach().to("cpu").contiguous().clone()
                shapes[fragment.name] = fragment.shape
        save_file(tensors, path)
        _fsync(path)
        return {"file": path.name, "sha256": _sha256(path), "shapes": shapes}
    except Exception as error:  # told to every rank, so that none waits for this one
        return {"file": path.name, "error": f"{type(error).__name__}: {error}"}


def _write_state(
    target: Path,
    engine: Engine,
    state: RunState,
    shapes: dict[str, tuple[int, ...]],
    digests: dict[str, str],
    world: World,
) -> None:
    described = {
        "format": FORMAT,
        "run": state.to_json(),
        "groups": engine.group_values(),
        "shapes": shapes,
        "written_by": {"world_size": world.size, "zero_stage": engine.stage},
    }
    path = target / "state.json"
    path.write_text(json.dumps(described, indent=1))
    _fsync(path)
    part = target / "COMPLETE.part"
    part.write_text(json.dumps({**digests, path.name: _sha256(path)}, indent=1))
    _fsync(part)
    _fsync(target)
    part.rename(target / "COMPLETE")
    _fsync(target)
    _fsync(target.parent)


def _retain(folder: Path, newest: Path, keep_last: int) -> None:
    """Torn checkpoints never count as kept ones."""
    kept = {*complete_checkpoints(folder)[-keep_last:], newest}
    for path in folder.iterdir():
        if _FOLDER.fullmatch(path.name) and path not in kept:
            (path / "COMPLETE").unlink(missing_ok=True)  # first, so that half a removal claims nothing
            shutil.rmtree(path, ignore_errors=True)


def _verify(checkpoint: Path, world: World) -> None:
    """Hashes of all files against COMPLETE; ranks share the reading."""
    try:
        complete = json.loads((checkpoint / "COMPLETE").read_text())
        items = sorted((str(name), str(digest)) for name, digest in complete.items())
    except FileNotFoundError:
        raise CheckpointError(
            where=str(checkpoint), expected="a complete checkpoint", found="no COMPLETE in it",
            fix="It was torn while being written; choose another one.",
        ) from None  # fmt: skip
    except (OSError, ValueError, AttributeError) as error:
        raise _damaged(checkpoint / "COMPLETE", str(error)) from None
    for name, digest in items[world.rank :: world.size]:
        path = checkpoint / name
        if Path(name).name != name or not path.is_file():
            raise _damaged(path, "no such file")
        if _sha256(path) != digest:
            raise _damaged(path, "other bytes than were written (SHA-256 differs)")


def _refuse_partial(checkpoint: Path, stored: _Tensors, wanted: dict[str, tuple[int, ...]], world: World) -> None:
    """Every rank names its own fragments; a stored tensor that no rank asks for is as wrong as a missing one."""
    everything: dict[str, tuple[int, ...]] = {}
    for names in gather_objects(wanted):
        everything |= names
    missing = sorted(everything.keys() - stored.shapes.keys())
    unknown = sorted(stored.shapes.keys() - everything.keys())
    other = sorted(n for n in everything.keys() & stored.shapes.keys() if everything[n] != stored.shapes[n])
    if missing or unknown or other:
        raise CheckpointError(
            where=str(checkpoint), expected="exactly this run's tensors",
            found=f"missing {_some(missing)}; unknown {_some(unknown)}; of another shape {_some(other)}",
            fix="Resume with the recipe that wrote it.",
        )  # fmt: skip


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return (", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")) or "none"


def _state_json(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / "state.json"
    try:
        described = json.loads(path.read_text())
        if described["format"] != FORMAT:
            raise _damaged(path, f"format {described['format']!r}, this version reads {FORMAT}")
        return {key: described[key] for key in ("run", "groups", "shapes")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from None


def _damaged(path: Path, found: str) -> CheckpointError:
    return CheckpointError(
        where=str(path), expected="an undamaged part of a checkpoint", found=found,
        fix="Choose another checkpoint, or delete this one so that the one before is used.",
    )  # fmt: skip


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
