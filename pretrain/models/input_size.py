"""A loaded encoder for images of another size than it was made for: its position embedding is interpolated."""

from __future__ import annotations

import itertools
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
        check_every_pixel_is_seen(module, new)
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
    check_every_pixel_is_seen(module, new)
    return None


def _set_open_clip(visual: Any, new: int) -> dict[str, object]:
    from open_clip.model import resize_pos_embed

    patch = max(visual.patch_size)
    check_every_pixel_is_seen(visual, new)
    old, visual.image_size, visual.grid_size = visual.grid_size, (new, new), (new // patch, new // patch)
    positions = {"visual.positional_embedding": visual.positional_embedding.detach()}
    resize_pos_embed(positions, SimpleNamespace(visual=visual))
    visual.positional_embedding = nn.Parameter(
        positions["visual.positional_embedding"], visual.positional_embedding.requires_grad
    )
    return _told(old, visual.grid_size, OPEN_CLIP_HOW)


def check_every_pixel_is_seen(module: nn.Module, size: int) -> None:
    """The first convolution (of a ViT: into patches) must reach the last rows and columns of `size` pixels.

    Raises:
        InputError: it leaves some out, which is no error to timm.
    """
    first = next((found for found in module.modules() if isinstance(found, nn.Conv2d)), None)
    embed = getattr(module, "patch_embed", None)
    # A subclass pads by the size of its input; and so does timm's embedding where it is told to.
    if first is None or type(first) is not nn.Conv2d or getattr(embed, "dynamic_img_pad", False):
        return
    if unseen := _unseen(first, size):
        fitting = next(larger for larger in itertools.count(size + 1) if not _unseen(first, larger))
        patches = first.kernel_size == first.stride
        raise InputError(
            where="--image-size",
            expected=f"a multiple of the patch size {max(first.stride)}" if patches else "one that is seen to its edge",
            found=f"{size}, whose last {unseen} rows and columns the encoder would not see",
            fix=f"Nearest above: {fitting}.",
        )


def _unseen(first: nn.Conv2d, size: int) -> int:
    """How many of the last pixels of a row or column no window of the convolution holds."""
    if isinstance(first.padding, str):
        return 0
    windows = zip(first.kernel_size, first.stride, first.padding, strict=True)
    return max(0, *((size + 2 * padding - kernel) % stride - padding for kernel, stride, padding in windows))


def _told(old: Any, new: Any, how: str) -> dict[str, object]:
    return {"from": list(old), "to": list(new), "how": how}
