"""What papers say of the runs that full-scale recipes repeat, written out by hand; what one does not do is left out.

A new recipe joins by an entry in `PUBLISHED` of its objective's test module.
"""

from __future__ import annotations

from pretrain.objectives.config import KINDS
from tests.objectives.cases import module_of
from tests.objectives.papers import CLASSES, Numbers, rand_augment

# What an entry need not say: what all of these papers have, by its path. What is off may be left out as well.
USUAL: Numbers = {
    "views": {"crop": "area", "ratio": (3 / 4, 4 / 3), "flip": 0.5},
    "mixing": {"probability": 1.0, "switch_probability": 0.5},
    "repeats": 1,
    "mean": (0.485, 0.456, 0.406),  # ImageNet's
    "std": (0.229, 0.224, 0.225),
    "model": {"library": "timm"},
    "objective": {"classifier_init": 0.02, "over_classes": "mean", "tokenizer": "clip"},
    "optim": {"layer_decay": 1.0, "eps": 1e-8},
}

PUBLISHED: dict[str, Numbers] = {name: entry for kind in KINDS for name, entry in module_of(kind).PUBLISHED.items()}


def student(ratio: int) -> Numbers:
    """With `ratio` unlabelled images for each labelled one, by which epochs, batch and learning rate are counted."""
    teacher = PUBLISHED["noisy_student_resnet50"]
    return {
        **teacher,
        "batch": 2048 * (1 + ratio),
        "optim": teacher["optim"] | {"lr_batch": 256 * (1 + ratio)},
        "augment": ({"rand_augment": rand_augment(9)},),
        "model": {"name": "resnet50", "image_size": 224, "options": {"zero_init_last": True, "drop_path_rate": 0.2}},
        "objective": {**CLASSES, "dropout": 0.5},
    }


# He et al. 2021, table 9, of ViT-B; where text and code differ, as the code has it.
MAE_FINETUNING: Numbers = {
    "batch": 1024,
    "schedule": {"kind": "cosine", "epochs": 100, "warmup": 5, "final_lr": 1e-6 / 2e-3},
    "optim": {
        "kind": "adamw", "peak_lr": 5e-4 * 1024 / 256, "lr_batch": 256, "betas": (0.9, 0.999), "weight_decay": 0.05,
        "layer_decay": 0.65,
    },
    "views": {"scale": (0.08, 1.0), "interpolation": "bicubic", "eval_crop": 0.875},
    "augment": (
        {
            "rand_augment": rand_augment(9),
            "erasing": {"probability": 0.25, "mode": "pixel", "area": (0.02, 1 / 3), "aspect": 0.3},
        },
    ),
    "mixing": {"mixup": 0.8, "cutmix": 1.0},
    "model": {"name": "vit_base_patch16_224", "image_size": 224, "options": {"drop_path_rate": 0.1}},
    "objective": {**CLASSES, "label_smoothing": 0.1, "classifier_init": 2e-5},
}  # fmt: skip

# MAE's FINETUNE.md, for larger models: (drop path, epochs, learning rate for 256 images, layer decay).
MAE_FINETUNING_BY_SIZE = {
    "vit_small_patch16_224": (0.1, 100, 5e-4, 0.65),  # no figure of theirs: as ViT-B
    "vit_base_patch16_224": (0.1, 100, 5e-4, 0.65),
    "vit_large_patch16_224": (0.2, 50, 1e-3, 0.75),
    "vit_huge_patch14_224": (0.3, 50, 1e-3, 0.75),
}
