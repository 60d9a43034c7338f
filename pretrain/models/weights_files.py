"""Files of weights as tensors by name; no file can run code."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from data_pipeline.errors import CheckpointError


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a weights file by name; a PyTorch file may hold other plain data beside them.

    Raises:
        CheckpointError: damaged, a pickle of more than plain data, or not exactly one dictionary of tensors.
    """
    try:
        if path.suffix == ".safetensors":
            tensors: dict[str, Tensor] = load_file(path)
            return tensors
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise CheckpointError(
            where=str(path),
            expected="safetensors, or a PyTorch file without objects that could run code",
            found=f"{type(error).__name__}: {(str(error).splitlines() or ['an empty file'])[0]}",
            fix="Save the tensors alone.",
        ) from error
    members = [content, *content.values()] if isinstance(content, dict) else []
    states = [member for member in members if _is_state(member)]
    if len(states) != 1:
        members_found = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise CheckpointError(
            where=str(path),
            expected="one dictionary of tensors",
            found=f"{len(states)} among {members_found}",
            fix="Save the one to be judged as safetensors.",
        )
    state = states[0]
    wrapped = all(name.startswith("module.") for name in state)  # by DistributedDataParallel
    return {name.removeprefix("module.") if wrapped else name: tensor for name, tensor in state.items()}


def read_shards(index: Path) -> dict[str, Tensor]:
    """The tensors of several safetensors files, of which an index (`weight_map`) says what lies in which.

    Raises:
        CheckpointError: a file is missing, damaged, elsewhere, or does not hold what the index says.
    """
    try:
        weight_map = dict(json.loads(index.read_text("utf-8"))["weight_map"])
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
                found=f"{len(held)}, of which these are in one alone: {', '.join(wrong[:8])}",
            )
    return state


def _is_state(value: object) -> bool:
    return isinstance(value, dict) and bool(value) and all(isinstance(tensor, Tensor) for tensor in value.values())
