"""CLIP's cases, its naive twin and its papers' numbers; further tests of it: test_image_text.py."""

from __future__ import annotations

from torch import Tensor

from data_pipeline.batch import Batch
from pretrain.objectives.clip.objective import Clip
from tests.objectives import naive, naive_image_text, papers, towers
from tests.objectives.cases import Case, Twin

CASES = {
    "clip": Case(towers.OPEN_CLIP, towers.config("clip")),
    "clip, timm": Case(towers.TIMM, towers.config("clip", **towers.BESIDE_TIMM)),
}


def naive_loss(objective: Clip, weights: naive.Weights, batch: Batch) -> Tensor:
    return naive_image_text.objective_loss("clip", weights, batch)


TWIN = Twin(CASES["clip"], naive_loss, batch_size=3)


PUBLISHED: dict[str, papers.Numbers] = {}

# Radford et al. 2021 (2103.00020), tables 18 and 20.
PUBLISHED["clip_vit_b32"] = {
    "batch": 32_768,
    "schedule": {"kind": "cosine", "epochs": 32, "warmup": 2000 * 32_768 / papers.PAIRS},
    "optim": {"kind": "adamw", "peak_lr": 5e-4, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.2},
    "views": papers.SQUARE,
    **papers.CLIP_PIXELS,
    "model": {"library": "open_clip", "name": "ViT-B-32-quickgelu", "image_size": 224},
    "objective": {"kind": "clip", "initial_scale": 1 / 0.07, "max_scale": 100},
}
PUBLISHED["clip_vit_b16"] = {
    **PUBLISHED["clip_vit_b32"],
    "model": {"library": "open_clip", "name": "ViT-B-16-quickgelu", "image_size": 224},
}
PUBLISHED["clip_vit_l14"] = {
    **PUBLISHED["clip_vit_b32"],
    "optim": {"kind": "adamw", "peak_lr": 4e-4, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.2},
    "model": {"library": "open_clip", "name": "ViT-L-14-quickgelu", "image_size": 224},
}
# Zhai et al. 2021 (2111.07991), of which the recipe's head says what was not checked.
PUBLISHED["lit_vit_b16"] = {
    "batch": 16_384,
    "schedule": {
        "kind": "cosine",
        "epochs": 900_000_000 / papers.PAIRS,
        "warmup": 0.00512 * 900_000_000 / papers.PAIRS,
    },
    "optim": {
        "kind": "adamw",
        "peak_lr": 1e-3,
        "betas": (0.9, 0.95),
        "eps": 1e-8,
        "weight_decay": 1e-4 / 1e-3,
        "clip_norm": 1.0,
    },
    "views": papers.SQUARE,
    "model": {"name": "vit_base_patch16_224", "image_size": 224},
    "objective": {
        "kind": "clip",
        "initial_scale": 1 / 0.07,
        "max_scale": 100,
        "lock_image": True,
        "embed_dim": 768,
        "text": {
            "width": 768,
            "heads": 12,
            "layers": 12,
            "context_length": 77,
            "vocab_size": 49408,
            "mlp_ratio": 4.0,
            "pool": "argmax",
            "causal": True,
        },
    },
}
