"""Images and texts in the one space of two towers: unit vectors of whole data sets and of lists of texts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from data_pipeline.errors import CheckpointError
from data_pipeline.progress import track
from pretrain.evals.encoder import Encoder
from pretrain.evals.features.extract import Extraction, full_precision, untouched
from pretrain.models.towers import TowerModules, Towers, embed_images
from pretrain.runtime.versions import LIBRARIES

TOWER_LIBRARIES = (*LIBRARIES, "open_clip_torch")


class ImageSide(nn.Module):
    """From normalized images [B, 3, S, S] to unit vectors [B, D]."""

    def __init__(self, parts: TowerModules) -> None:
        super().__init__()
        self.encoder, self.projection, self.text = parts

    def forward(self, images: Tensor) -> Tensor:
        return embed_images(TowerModules(self.encoder, self.projection, self.text), images)


def image_side(towers: Towers) -> Encoder:
    """What features are extracted by; the report tells of the towers as a whole."""
    return Encoder(
        ImageSide(towers.module.parts),
        towers.preprocessing,
        tag=towers.tag,
        description=towers.description,
        run=towers.run,
    )


def embed_texts(towers: Towers, texts: Sequence[str], extraction: Extraction, *, label: str) -> Tensor:
    """Unit vectors [len(texts), D], fp32, on the CPU.

    Raises:
        CheckpointError: a vector is not finite.
    """
    size = extraction.batch_size
    pieces = [list(texts[first : first + size]) for first in range(0, len(texts), size)]
    found = []
    bf16 = extraction.precision == "bf16"
    with untouched(towers.module), full_precision():
        for piece in track(pieces, label=label, total=len(pieces)):
            tokens = towers.tokenize(piece).to(towers.device)
            with torch.autocast(towers.device.type, torch.bfloat16, enabled=bf16):
                found.append(towers.encode_text(tokens).float().cpu())
    vectors = torch.cat(found)
    broken = (~vectors.isfinite().all(dim=1)).nonzero().flatten().tolist()
    if broken:
        raise CheckpointError(
            where="text tower",
            expected="finite embeddings",
            found=f"others for {len(broken)} of {len(texts)} texts, such as {texts[broken[0]]!r}",
            fix="Check that its training did not diverge, or use fp32.",
        )
    return vectors
