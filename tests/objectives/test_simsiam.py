"""SimSiam's cases, its naive twin and its papers' numbers; further tests of it: test_siamese.py."""

from __future__ import annotations

from torch import Tensor

from data_pipeline.batch import Batch
from pretrain.objectives.simsiam.config import SimSiamConfig
from pretrain.objectives.simsiam.objective import SimSiam
from tests.objectives import cases, naive, naive_siamese, papers
from tests.objectives.cases import Case, Twin

SIMSIAM = SimSiamConfig(kind="simsiam", projector_width=24, predictor_width=12)
CASES = {
    "simsiam": Case(cases.TINY_RESNET, SIMSIAM, bf16_atol=1e-2),
    "simsiam, vit": Case(cases.TINY_VIT, SIMSIAM, bf16_atol=1e-2),
}


def naive_loss(objective: SimSiam, weights: naive.Weights, batch: Batch) -> Tensor:
    shape = naive.Shape(2, 3, 2, class_token=False)
    return naive_siamese.simsiam_loss(weights, *batch.views, shape, SIMSIAM.projector_layers)


TWIN = Twin(Case(cases.TWIN_VIT, SIMSIAM), naive_loss, batch_size=4)


PUBLISHED: dict[str, papers.Numbers] = {}

# Chen & He 2020 (2011.10566), section 3 and, of CIFAR-10, appendix D.
PUBLISHED["simsiam_resnet50"] = {
    "batch": 512,
    "schedule": {"kind": "cosine", "epochs": 100, "warmup": 0},
    "optim": {"kind": "sgd", "peak_lr": 0.05 * 512 / 256, "lr_batch": 256, "momentum": 0.9, "weight_decay": 1e-4},
    "views": {"scale": (0.2, 1.0), "interpolation": "bilinear", "eval_crop": 0.875},
    "augment": ({"jitter": papers.JITTER, "grayscale": 0.2, "blur": {"probability": 0.5, "sigma": papers.BLUR}},),
    "model": {"name": "resnet50", "image_size": 224},
    "objective": {
        "kind": "simsiam", "projector_layers": 3, "projector_width": 2048, "predictor_width": 512,
        "fixed_predictor_lr": True,
    },
}  # fmt: skip
PUBLISHED["simsiam_cifar10_resnet18"] = {
    "batch": 512,
    "schedule": {"kind": "cosine", "epochs": 200, "warmup": 0},
    "optim": {"kind": "sgd", "peak_lr": 0.03 * 512 / 256, "lr_batch": 256, "momentum": 0.9, "weight_decay": 5e-4},
    "views": {"scale": (0.2, 1.0), "interpolation": "bilinear", "eval_crop": 1.0},
    "augment": ({"jitter": papers.JITTER, "grayscale": 0.2},),
    **papers.CIFAR10_PIXELS,
    "model": {"name": "resnet18_cifar", "image_size": 32},
    "objective": {
        "kind": "simsiam", "projector_layers": 2, "projector_width": 2048, "predictor_width": 512,
        "fixed_predictor_lr": True,
    },
}  # fmt: skip
