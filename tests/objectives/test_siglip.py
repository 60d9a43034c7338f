"""SigLIP's cases, its naive twin and its papers' numbers; further tests of it: test_image_text.py."""

from __future__ import annotations

from torch import Tensor

from data_pipeline.batch import Batch
from pretrain.objectives.siglip.objective import Siglip
from tests.objectives import naive, naive_image_text, papers, towers
from tests.objectives.cases import Case, Twin

CASES = {
    "siglip": Case(towers.OPEN_CLIP, towers.config("siglip")),
    "siglip, timm": Case(towers.TIMM, towers.config("siglip", **towers.BESIDE_TIMM)),
}


def naive_loss(objective: Siglip, weights: naive.Weights, batch: Batch) -> Tensor:
    return naive_image_text.objective_loss("siglip", weights, batch)


TWIN = Twin(CASES["siglip"], naive_loss, batch_size=3)


PUBLISHED: dict[str, papers.Numbers] = {}

# Zhai et al. 2023 (2303.15343): loss, temperature, bias and batch; the length is CLIP's, as the data are not WebLI.
PUBLISHED["siglip_vit_b16"] = {
    "batch": 32_768,
    "schedule": {"kind": "cosine", "epochs": 32, "warmup": 2000 * 32_768 / papers.PAIRS},
    "optim": {
        "kind": "adamw", "peak_lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 1e-4 / 1e-3,
        "clip_norm": 1.0,
    },
    "views": papers.SQUARE,
    **papers.HALVES,
    "model": {"library": "open_clip", "name": "ViT-B-16-SigLIP", "image_size": 224, "vocab_size": 49408},
    "objective": {"kind": "siglip", "initial_scale": 10, "initial_bias": -10},
}  # fmt: skip
