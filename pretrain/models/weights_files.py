"""Files of weights as tensors by name; no file can run code."""

from __future__ import annotations

import argparse
import json
import pickle
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from data_pipeline.durable import from_json
from data_pipeline.errors import CheckpointError
from data_pipeline.messages import short_list
from pretrain.models.foreign.pickle_contents import entry, expressions, look_into

# What torch raises of damaged files, and of pickles that give arguments which a class does not take.
_UNREADABLE = (
    SafetensorError,
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
)

# What training keeps beside the weights, some of it tensors too.
_BESIDE = {
    "optimizer", "optimizer_state_dict", "scaler", "amp_scaler", "loss_scaler", "fp16_scaler", "lr_scheduler",
    "scheduler", "epoch", "args",
}  # fmt: skip

_PLACES_SHOWN = 4


@dataclass(frozen=True)
class Part:
    """Which tensors of a weights file are taken.

    Attributes:
        key: of the entry that holds them, such as `teacher`; None: the only one that can be meant.
        prefix: with which their names begin; it is taken off, and tensors of other names are left out.
        ignore: patterns of names, the prefix taken off, that are left out where the encoder does not need them.
    """

    key: str | None = None
    prefix: str = ""
    ignore: tuple[str, ...] = ()


WHOLE = Part()


def read_tensors(path: Path, key: str | None = None) -> dict[str, Tensor]:
    """The tensors of a weights file by name; a PyTorch file may hold other plain data beside them.

    Args:
        path: safetensors, or a PyTorch file of tensors.
        key: of the entry that holds them; None: the only one that can be meant.

    Raises:
        CheckpointError: damaged, a pickle of more than plain data, or not exactly one dictionary of tensors that can be
            meant.
    """
    state = _chosen(_content(path, key), key, path)
    if all(name.startswith("module.") for name in state):  # by DistributedDataParallel
        return {name.removeprefix("module."): tensor for name, tensor in state.items()}
    return state


def _content(path: Path, key: str | None) -> object:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # the options of a training script, no code
            return torch.load(path, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"the object {refused[1]}" if refused else (str(error).splitlines() or ["an empty file"])[0]
        raise CheckpointError(
            where=str(path),
            expected="safetensors, or a PyTorch file without objects that could run code",
            found=f"{type(error).__name__}: {reason}",
            fix=_saving(path, key) if refused else "Fetch or save it again, if it is one of these.",
        ) from error


def _saving(path: Path, key: str | None) -> str:
    """How tensors are saved alone: a command for each place in the file that may be meant."""
    places = expressions(look_into(path))
    if key is not None:
        places = [place for place in places if entry(key) in place] or [entry(key)]
    else:
        places = [place for place in places if not any(entry(name) in place for name in _BESIDE)]
    runs = "This runs code of the file, so only if you trust it:"
    if not places:
        return f"Save the tensors alone, by name. {runs}\n  {_command(path, 'x')}\nwith what holds them in place of x."
    which = "the one that is meant" if len(places) > 1 else "the tensors alone"
    return "\n  ".join([f"Save {which}. {runs}", *(_command(path, place) for place in places[:_PLACES_SHOWN])])


def _command(path: Path, place: str) -> str:
    file = json.dumps(str(path), ensure_ascii=False)
    code = f'import torch; x = torch.load({file}, weights_only=False); torch.save({place}, "weights.pth")'
    return f"python -c {shlex.quote(code)}"


def _chosen(content: object, key: str | None, path: Path) -> dict[str, Tensor]:
    members = content if isinstance(content, dict) else {}
    states = {name: member for name, member in members.items() if _is_state(member)}
    members_found = ", ".join(map(str, members)) or type(content).__name__
    if key is not None:
        if key not in states:
            raise CheckpointError(
                where=f"{path}: {key}",
                expected=f"a dictionary of tensors; there are {', '.join(map(str, states)) or 'none with a name'}",
                found="another kind of entry" if key in members else "no such entry",
                fix="Name another with --weights-key, or none.",
            )
        return states[key]
    if _is_state(content):
        return members
    meant = {name: state for name, state in states.items() if name not in _BESIDE}
    if len(meant) != 1:
        raise CheckpointError(
            where=str(path),
            expected="one dictionary of tensors",
            found=f"{len(meant)} among {members_found}",
            fix=f"Choose one with --weights-key ({', '.join(map(str, meant))}) and --model, or save it as safetensors."
            if meant
            else "Save the one to be judged as safetensors.",
        )
    return next(iter(meant.values()))


def read_shards(index: Path) -> dict[str, Tensor]:
    """The tensors of several safetensors files, of which an index (`weight_map`) says what lies in which.

    Raises:
        CheckpointError: a file is missing, damaged, elsewhere, or does not hold what the index says.
    """
    try:
        weight_map = dict(from_json(index.read_text("utf-8"))["weight_map"])
        files = sorted({str(name) for name in weight_map.values()})
        if elsewhere := [name for name in files if Path(name).name != name or not name.endswith(".safetensors")]:
            raise ValueError(f"{elsewhere[0]!r} is no safetensors file beside it")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            where=str(index), expected="an index of safetensors files", found=f"{type(error).__name__}: {error}"
        ) from error
    state: dict[str, Tensor] = {}
    for name in files:
        state |= (held := read_tensors(index.with_name(name)))
        told = {tensor for tensor, file in weight_map.items() if file == name}
        if wrong := sorted(told ^ held.keys()):
            raise CheckpointError(
                where=str(index.with_name(name)),
                expected=f"the {len(told)} tensors that {index.name} says",
                found=f"{len(held)}, of which these are in one alone: {short_list(wrong)}",
            )
    return state


def _is_state(value: object) -> TypeGuard[dict[str, Tensor]]:
    return isinstance(value, dict) and bool(value) and all(isinstance(tensor, Tensor) for tensor in value.values())
