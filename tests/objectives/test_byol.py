"""BYOL's cases, its naive twin and its papers' numbers; further tests of it: test_siamese.py."""

from __future__ import annotations

from torch import Tensor

from data_pipeline.batch import Batch
from pretrain.objectives.byol.config import ByolConfig
from pretrain.objectives.byol.objective import Byol
from tests.objectives import cases, naive, naive_siamese, papers
from tests.objectives.cases import Case, Twin

BYOL = ByolConfig(kind="byol", hidden_width=24, out_width=12, base_decay=0.9)
CASES = {"byol": Case(cases.TINY_RESNET, BYOL), "byol, vit": Case(cases.TINY_VIT, BYOL)}


def naive_loss(objective: Byol, weights: naive.Weights, batch: Batch) -> Tensor:
    return naive_siamese.byol_loss(weights, *batch.views, naive.Shape(2, 3, 2, class_token=False))


TWIN = Twin(Case(cases.TWIN_VIT, BYOL), naive_loss, batch_size=4)


PUBLISHED: dict[str, papers.Numbers] = {}

# Grill et al. 2020 (2006.07733), section 3.3 and table 6.
PUBLISHED["byol_resnet50"] = {
    "batch": 4096,
    "schedule": {"kind": "cosine", "epochs": 1000, "warmup": 10},
    "optim": {
        "kind": "lars",
        "peak_lr": 0.2 * 4096 / 256,
        "lr_batch": 256,
        "momentum": 0.9,
        "eta": 1e-3,
        "weight_decay": 1.5e-6,
    },
    "views": {"scale": (0.08, 1.0), "interpolation": "bicubic", "eval_crop": 0.875},
    "augment": (
        {
            "jitter": papers.JITTER | {"saturation": 0.2},
            "grayscale": 0.2,
            "blur": {"probability": 1.0, "sigma": papers.BLUR},
        },
        {
            "jitter": papers.JITTER | {"saturation": 0.2},
            "grayscale": 0.2,
            "blur": {"probability": 0.1, "sigma": papers.BLUR},
            "solarize": 0.2,
        },
    ),
    "model": {"name": "resnet50", "image_size": 224},
    "objective": {"kind": "byol", "hidden_width": 4096, "out_width": 256, "base_decay": 0.996},
}
# lightly's benchmark; of its rate a quarter and of its decay four times, as its loss is a quarter as steep.
PUBLISHED["byol_cifar10_resnet18"] = {
    "batch": 512,
    "schedule": {"kind": "cosine", "epochs": 200, "warmup": 0},
    "optim": {
        "kind": "sgd",
        "peak_lr": 0.06 * 512 / 128 / 4,
        "lr_batch": 256,
        "momentum": 0.9,
        "weight_decay": 4 * 5e-4,
    },
    "views": {"scale": (0.08, 1.0), "interpolation": "bilinear", "eval_crop": 1.0},
    "augment": ({"jitter": papers.JITTER, "grayscale": 0.2},),
    **papers.CIFAR10_PIXELS,
    "model": {"name": "resnet18_cifar", "image_size": 32},
    "objective": {"kind": "byol", "hidden_width": 1024, "out_width": 256, "base_decay": 0.99},
}
