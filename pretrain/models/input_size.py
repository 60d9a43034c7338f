"""A loaded encoder for images of another size than it was made for: its position embedding is interpolated."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from timm.models.vision_transformer import VisionTransformer
from torch import nn

from data_pipeline.errors import InputError

TIMM_HOW = "bicubic, antialiased, as timm's resample_abs_pos_embed"
OPEN_CLIP_HOW = "bicubic, antialiased, as open_clip's resize_pos_embed"


def set_image_size(module: nn.Module, old: int, new: int) -> dict[str, object] | None:
    """Changes the module in place.

    Args:
        module: with its weights.
        old, new: pixels.

    Returns:
        For a report: the grid of positions before and after (`from`, `to`), and `how`; None where nothing depends
        on the size.

    Raises:
        InputError: no multiple of the patch, or an encoder whose size is fixed.
    """
    if new == old:
        return None
    if isinstance(module, VisionTransformer):
        grid: Any = module.patch_embed.grid_size
        _check_multiple(new, max(module.patch_embed.patch_size))
        module.set_input_size(img_size=(new, new))
        return _told(grid, module.patch_embed.grid_size, TIMM_HOW) if module.pos_embed is not None else None
    from open_clip.transformer import VisionTransformer as OpenClipTransformer  # half a second, which few need

    if isinstance(module, OpenClipTransformer):
        return _set_open_clip(module, new)
    config: Any = getattr(module, "pretrained_cfg", {"fixed_input_size": True})
    if config.get("fixed_input_size", False):
        raise InputError(
            where="--image-size",
            expected=f"{old}, as {type(module).__name__} was made for this size alone",
            found=str(new),
            fix="Only the position embedding of a ViT can be interpolated.",
        )
    return None


def _set_open_clip(visual: Any, new: int) -> dict[str, object]:
    from open_clip.model import resize_pos_embed

    patch = max(visual.patch_size)
    _check_multiple(new, patch)
    old, visual.image_size, visual.grid_size = visual.grid_size, (new, new), (new // patch, new // patch)
    positions = {"visual.positional_embedding": visual.positional_embedding.detach()}
    resize_pos_embed(positions, SimpleNamespace(visual=visual))
    visual.positional_embedding = nn.Parameter(
        positions["visual.positional_embedding"], visual.positional_embedding.requires_grad
    )
    return _told(old, visual.grid_size, OPEN_CLIP_HOW)


def _check_multiple(size: int, patch: int) -> None:
    if size % patch:
        raise InputError(
            where="--image-size",
            expected=f"a multiple of the patch size {patch}",
            found=str(size),
            fix=f"Nearest above: {-(-size // patch) * patch}.",
        )


def _told(old: Any, new: Any, how: str) -> dict[str, object]:
    return {"from": list(old), "to": list(new), "how": how}
