"""The repeated blocks of encoders and decoders: what is recomputed, or compiled, one by one."""

from __future__ import annotations

import re

from torch import nn

_CONTAINER = re.compile(r"(blocks|resblocks|layer\d+)")  # timm's ViT and our decoder; open_clip's towers; timm's ResNet


def repeated_blocks(module: nn.Module) -> dict[str, nn.Module]:
    """Transformer blocks, and residual blocks of ResNets, by their names in `module`; none lies in another."""
    found: dict[str, nn.Module] = {}
    for name, container in module.named_modules():
        if _CONTAINER.fullmatch(name.rpartition(".")[2]) and isinstance(container, nn.Sequential | nn.ModuleList):
            found |= {f"{name}.{child}": block for child, block in container.named_children()}
    return found
