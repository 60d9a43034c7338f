"""What papers say of the runs that full-scale recipes repeat, written out by hand; what one does not do is left out.

A new recipe joins by an entry here.
"""

from __future__ import annotations

from typing import Any

IMAGENET, CIFAR10, PAIRS = 1_281_167, 50_000, 400_000_000  # samples

Numbers = dict[str, Any]

# What an entry need not say: what all of these papers have, by its path. What is off may be left out as well.
USUAL: Numbers = {
    "views": {"ratio": (3 / 4, 4 / 3), "flip": 0.5},
    "mixing": {"probability": 1.0, "switch_probability": 0.5},
    "repeats": 1,
    "mean": (0.485, 0.456, 0.406),  # ImageNet's
    "std": (0.229, 0.224, 0.225),
    "model": {"library": "timm"},
    "objective": {"classifier_init": 0.02, "over_classes": "mean", "tokenizer": "clip"},
    "optim": {"layer_decay": 1.0, "eps": 1e-8},
}

JITTER = {"probability": 0.8, "brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}
BLUR = (0.1, 2.0)
CLIP_PIXELS = {
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
}
CIFAR10_PIXELS = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616)}
HALVES = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
WHOLE = {"scale": (0.9, 1.0), "ratio": (1.0, 1.0), "flip": 0.0, "interpolation": "bicubic", "eval_crop": 1.0}
CLASSES: Numbers = {"kind": "supervised", "num_classes": 1000, "loss": "ce"}


def rand_augment(magnitude: float) -> Numbers:
    """timm's rand-mM-mstd0.5-inc1."""
    return {"num_ops": 2, "magnitude": magnitude, "magnitude_std": 0.5, "probability": 0.5, "increasing": True}


PUBLISHED: dict[str, Numbers] = {}

# He et al. 2021 (2111.06377), table 8.
PUBLISHED["mae_vit_b16"] = {
    "batch": 4096,
    "schedule": {"kind": "cosine", "epochs": 800, "warmup": 40},
    "optim": {
        "kind": "adamw", "peak_lr": 1.5e-4 * 4096 / 256, "lr_batch": 256, "betas": (0.9, 0.95), "weight_decay": 0.05,
    },
    "views": {"scale": (0.2, 1.0), "interpolation": "bicubic", "eval_crop": 0.875},
    "model": {"name": "vit_base_patch16_224", "image_size": 224},
    "objective": {
        "kind": "mae", "mask_ratio": 0.75, "decoder_width": 512, "decoder_depth": 8, "decoder_heads": 16,
        "normalize_target": True,
    },
}  # fmt: skip
PUBLISHED["mae_vit_l16"] = {
    **PUBLISHED["mae_vit_b16"],
    "model": {"name": "vit_large_patch16_224", "image_size": 224},
}

# Xie et al. 2021 (2111.09886), section 4.1 and the authors' configurations of 800 epochs.
PUBLISHED["simmim_vit_b16"] = {
    "batch": 2048,
    "schedule": {"kind": "step", "epochs": 800, "warmup": 10, "milestones": (700,), "gamma": 0.1},
    "optim": {
        "kind": "adamw", "peak_lr": 1e-4 * 2048 / 512, "lr_batch": 512, "betas": (0.9, 0.999), "weight_decay": 0.05,
        "clip_norm": 5.0,
    },
    "views": {"scale": (0.67, 1.0), "interpolation": "bilinear", "eval_crop": 0.875},
    "model": {
        "name": "vit_base_patch16_224", "image_size": 224,
        "options": {"global_pool": "avg", "init_values": 0.1, "drop_path_rate": 0.1},
    },
    "objective": {"kind": "simmim", "mask_ratio": 0.6, "mask_patch": 32},
}  # fmt: skip
PUBLISHED["simmim_swin_b"] = {
    **PUBLISHED["simmim_vit_b16"],
    "model": {"name": "swin_base_patch4_window7_224", "image_size": 192, "options": {"window_size": 6}},
}

# Grill et al. 2020 (2006.07733), section 3.3 and table 6.
PUBLISHED["byol_resnet50"] = {
    "batch": 4096,
    "schedule": {"kind": "cosine", "epochs": 1000, "warmup": 10},
    "optim": {
        "kind": "lars", "peak_lr": 0.2 * 4096 / 256, "lr_batch": 256, "momentum": 0.9, "eta": 1e-3,
        "weight_decay": 1.5e-6,
    },
    "views": {"scale": (0.08, 1.0), "interpolation": "bicubic", "eval_crop": 0.875},
    "augment": (
        {"jitter": JITTER | {"saturation": 0.2}, "grey": 0.2, "blur": {"probability": 1.0, "sigma": BLUR}},
        {
            "jitter": JITTER | {"saturation": 0.2}, "grey": 0.2, "blur": {"probability": 0.1, "sigma": BLUR},
            "solarise": 0.2,
        },
    ),
    "model": {"name": "resnet50", "image_size": 224},
    "objective": {"kind": "byol", "hidden_width": 4096, "out_width": 256, "base_decay": 0.996},
}  # fmt: skip
# lightly's benchmark; of its rate a quarter and of its decay four times, as its loss is a quarter as steep.
PUBLISHED["byol_cifar10_resnet18"] = {
    "batch": 512,
    "schedule": {"kind": "cosine", "epochs": 200, "warmup": 0},
    "optim": {
        "kind": "sgd", "peak_lr": 0.06 * 512 / 128 / 4, "lr_batch": 256, "momentum": 0.9, "weight_decay": 4 * 5e-4,
    },
    "views": {"scale": (0.08, 1.0), "interpolation": "bilinear", "eval_crop": 1.0},
    "augment": ({"jitter": JITTER, "grey": 0.2},),
    **CIFAR10_PIXELS,
    "model": {"name": "resnet18_cifar", "image_size": 32},
    "objective": {"kind": "byol", "hidden_width": 1024, "out_width": 256, "base_decay": 0.99},
}  # fmt: skip

# Chen & He 2020 (2011.10566), section 3 and, of CIFAR-10, appendix D.
PUBLISHED["simsiam_resnet50"] = {
    "batch": 512,
    "schedule": {"kind": "cosine", "epochs": 100, "warmup": 0},
    "optim": {"kind": "sgd", "peak_lr": 0.05 * 512 / 256, "lr_batch": 256, "momentum": 0.9, "weight_decay": 1e-4},
    "views": {"scale": (0.2, 1.0), "interpolation": "bilinear", "eval_crop": 0.875},
    "augment": ({"jitter": JITTER, "grey": 0.2, "blur": {"probability": 0.5, "sigma": BLUR}},),
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
    "augment": ({"jitter": JITTER, "grey": 0.2},),
    **CIFAR10_PIXELS,
    "model": {"name": "resnet18_cifar", "image_size": 32},
    "objective": {
        "kind": "simsiam", "projector_layers": 2, "projector_width": 2048, "predictor_width": 512,
        "fixed_predictor_lr": True,
    },
}  # fmt: skip

# Radford et al. 2021 (2103.00020), tables 18 and 20.
PUBLISHED["clip_vit_b32"] = {
    "batch": 32_768,
    "schedule": {"kind": "cosine", "epochs": 32, "warmup": 2000 * 32_768 / PAIRS},
    "optim": {"kind": "adamw", "peak_lr": 5e-4, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.2},
    "views": WHOLE,
    **CLIP_PIXELS,
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

# Zhai et al. 2023 (2303.15343): loss, temperature, bias and batch; the length is CLIP's, as the data are not WebLI.
PUBLISHED["siglip_vit_b16"] = {
    "batch": 32_768,
    "schedule": {"kind": "cosine", "epochs": 32, "warmup": 2000 * 32_768 / PAIRS},
    "optim": {
        "kind": "adamw", "peak_lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 1e-4 / 1e-3,
        "clip_norm": 1.0,
    },
    "views": WHOLE,
    **HALVES,
    "model": {"library": "open_clip", "name": "ViT-B-16-SigLIP", "image_size": 224, "vocab_size": 49408},
    "objective": {"kind": "siglip", "initial_scale": 10, "initial_bias": -10},
}  # fmt: skip
# Zhai et al. 2021 (2111.07991), of which the recipe's head says what was not checked.
PUBLISHED["lit_vit_b16"] = {
    "batch": 16_384,
    "schedule": {"kind": "cosine", "epochs": 900_000_000 / PAIRS, "warmup": 0.00512 * 900_000_000 / PAIRS},
    "optim": {
        "kind": "adamw", "peak_lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 1e-4 / 1e-3,
        "clip_norm": 1.0,
    },
    "views": WHOLE,
    "model": {"name": "vit_base_patch16_224", "image_size": 224},
    "objective": {
        "kind": "clip", "initial_scale": 1 / 0.07, "max_scale": 100, "lock_image": True, "embed_dim": 768,
        "text": {
            "width": 768, "heads": 12, "layers": 12, "context_length": 77, "vocab_size": 49408, "mlp_ratio": 4.0,
            "pool": "argmax", "causal": True,
        },
    },
}  # fmt: skip

# Goyal et al. 2017 (1706.02677), section 5.1.
PUBLISHED["supervised_resnet50_goyal"] = {
    "batch": 8192,
    "schedule": {"kind": "step", "epochs": 90, "warmup": 5, "milestones": (30, 60, 80), "gamma": 0.1},
    "optim": {
        "kind": "sgd", "peak_lr": 0.1 * 8192 / 256, "lr_batch": 256, "momentum": 0.9, "nesterov": True,
        "weight_decay": 1e-4,
    },
    "views": {"scale": (0.08, 1.0), "interpolation": "bicubic", "eval_crop": 0.875},
    "model": {"name": "resnet50", "image_size": 224},
    "objective": {**CLASSES, "classifier_init": 0.01},
}  # fmt: skip

# Wightman et al. 2021 (2110.00476), table 2.
PUBLISHED["rsb_a1_resnet50"] = {
    "batch": 2048,
    "schedule": {"kind": "cosine", "epochs": 600, "warmup": 5},
    "optim": {
        "kind": "lamb", "peak_lr": 5e-3, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.01, "clip_norm": 1.0,
    },
    "views": {"scale": (0.08, 1.0), "interpolation": "bicubic", "eval_crop": 0.95},
    "augment": ({"rand_augment": rand_augment(7)},),
    "mixing": {"mixup": 0.2, "cutmix": 1.0},
    "repeats": 3,
    "model": {"name": "resnet50", "image_size": 224, "options": {"drop_path_rate": 0.05}},
    "objective": {**CLASSES, "loss": "bce", "label_smoothing": 0.1},
}  # fmt: skip
PUBLISHED["rsb_a2_resnet50"] = {
    **PUBLISHED["rsb_a1_resnet50"],
    "schedule": {"kind": "cosine", "epochs": 300, "warmup": 5},
    "optim": PUBLISHED["rsb_a1_resnet50"]["optim"] | {"weight_decay": 0.02},
    "mixing": {"mixup": 0.1, "cutmix": 1.0},
    "objective": {**CLASSES, "loss": "bce", "target_threshold": 0.2},
}
PUBLISHED["rsb_a3_resnet50"] = {
    **PUBLISHED["rsb_a2_resnet50"],
    "schedule": {"kind": "cosine", "epochs": 100, "warmup": 5},
    "optim": PUBLISHED["rsb_a2_resnet50"]["optim"] | {"peak_lr": 8e-3},
    "augment": ({"rand_augment": rand_augment(6)},),
    "repeats": 1,
    "model": {"name": "resnet50", "image_size": 160, "eval_size": 224},
}

# Dosovitskiy et al. 2020 (2010.11929), table 3 and appendix B.1.
PUBLISHED["supervised_vit_b16"] = {
    "batch": 4096,
    "schedule": {"kind": "cosine", "epochs": 300, "warmup": 10_000 * 4096 / IMAGENET},
    "optim": {"kind": "adamw", "peak_lr": 3e-3, "betas": (0.9, 0.999), "weight_decay": 0.3, "clip_norm": 1.0},
    "views": {"scale": (0.05, 1.0), "interpolation": "bicubic", "eval_crop": 0.875},
    **HALVES,
    "model": {
        "name": "vit_base_patch16_224", "image_size": 224, "options": {"pos_drop_rate": 0.1, "proj_drop_rate": 0.1},
    },
    "objective": CLASSES,
}  # fmt: skip
# Chen et al. 2023 (2312.00950) with SimMIM's masks; the weights of the terms are ours.
PUBLISHED["supervised_simmim_vit_b16"] = {
    **PUBLISHED["supervised_vit_b16"],
    "model": {
        "name": "vit_base_patch16_224", "image_size": 224,
        "options": {"pos_drop_rate": 0.1, "proj_drop_rate": 0.1, "global_pool": "avg"},
    },
    "objective": {
        "kind": "sum",
        "terms": (
            {"weight": 1.0, "objective": {**CLASSES, "classifier_init": 0.02, "over_classes": "mean"}},
            {"weight": 1.0, "objective": {"kind": "simmim", "mask_ratio": 0.6, "mask_patch": 32}},
        ),
    },
}  # fmt: skip

# Xie et al. 2019 (1911.04252), section 3.1, by a ResNet-50 and its optimizer (Goyal et al.).
PUBLISHED["noisy_student_resnet50"] = {
    "batch": 2048,
    "schedule": {"kind": "cosine", "epochs": 350, "warmup": 5},
    "optim": {"kind": "sgd", "peak_lr": 0.1 * 2048 / 256, "lr_batch": 256, "momentum": 0.9, "weight_decay": 1e-4},
    "views": {"scale": (0.08, 1.0), "interpolation": "bicubic", "eval_crop": 0.875},
    "model": {"name": "resnet50", "image_size": 224, "options": {"zero_init_last": True}},
    "objective": {**CLASSES, "label_smoothing": 0.1},
}


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
