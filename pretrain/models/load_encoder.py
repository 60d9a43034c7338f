"""An encoder out of a folder, whichever library the folder belongs to."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from pretrain.models.encoder_folders import EncoderConfig, load_timm_encoder
from pretrain.models.folders import OPEN_CLIP_CONFIG


def load_encoder(folder: Path) -> tuple[nn.Module, EncoderConfig]:
    """The encoder of a folder as `save_encoder`, timm (without a head) or open_clip writes it, on the CPU.

    Raises:
        CheckpointError: a file is missing or damaged, or the weights do not fit the architecture exactly.
    """
    if not (folder / OPEN_CLIP_CONFIG).is_file():
        return load_timm_encoder(folder)
    from pretrain.models.tower_folders import load_open_clip  # open_clip takes seconds to import

    module, config, _ = load_open_clip(folder)
    return module.encoder, config
