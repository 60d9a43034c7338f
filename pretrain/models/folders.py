"""Files of an exported model: each appears whole or not at all, and a configuration carries the hash of its weights."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pretrain.runtime.run_folder import sha256_of

WEIGHTS, CONFIG = "model.safetensors", "config.json"
PYTORCH = "pytorch_model.bin"  # which timm's and transformers' older savers write
OPEN_CLIP_CONFIG = "open_clip_config.json"
TOWERS = "towers"  # a folder beside timm's files, with the text tower and what else timm knows nothing of


def save_weights(path: Path, state: Mapping[str, Tensor], config_path: Path, config: Mapping[str, Any]) -> None:
    """Writes weights as safetensors, then a configuration with their `file_sha256`, so that an interrupted save shows.

    Args:
        path: of the weights; its folder is there.
        state: whole logical tensors.
        config_path: of the configuration.
        config: plain data.
    """
    partial = path.with_name(f".{path.name}.tmp")
    with partial.open("wb") as file:
        mode = os.fstat(file.fileno()).st_mode  # as the umask says; safetensors gives 0600 to what it writes
    save_file({name: t.detach().cpu().contiguous() for name, t in state.items()}, partial, {"format": "pt"})
    partial.chmod(mode)
    told = {**config, "file_sha256": sha256_of(partial)}
    _publish(partial, path)
    partial = config_path.with_name(f".{config_path.name}.tmp")
    partial.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    _publish(partial, config_path)


def weights_sha256(module: nn.Module) -> str:
    """Over names, types, shapes and bytes of parameters and buffers, sorted; no file layout enters it."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _publish(partial: Path, path: Path) -> None:
    """Makes the bytes durable before the name, so that a name never stands for half a file."""
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)
