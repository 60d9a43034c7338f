"""What the test module of an objective is made of: cases at which the contract suite builds it, and its naive twin."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from data_pipeline.batch import Batch, BatchSpec
from pretrain.objectives.config import KINDS, ObjectiveConfig
from pretrain.objectives.contract import Objective
from pretrain.objectives.kinds import build_objective
from pretrain.recipe import recipe
from tests.objectives.naive import Weights

TINY_VIT = recipe.Model(
    name="vit_tiny_patch16_224",
    image_size=16,
    patch_size=4,
    options={
        "embed_dim": 16,
        "depth": 2,
        "num_heads": 2,
        "class_token": False,
        "global_pool": "avg",
        "fc_norm": False,
    },
)
CLASS_TOKEN_VIT = TINY_VIT.model_copy(
    update={"options": {"embed_dim": 16, "depth": 2, "num_heads": 2, "reg_tokens": 2}}
)
TINY_SWIN = recipe.Model(
    name="swin_tiny_patch4_window7_224",
    image_size=32,
    patch_size=2,
    options={"embed_dim": 8, "depths": (2, 2), "num_heads": (1, 2), "window_size": 4, "drop_path_rate": 0.0},
)
TINY_SWIN_V2 = TINY_SWIN.model_copy(update={"name": "swinv2_tiny_window8_256"})
TINY_RESNET = recipe.Model(name="test_resnet", image_size=32)
# Small enough for twins that compute value by value; naive.Shape(2, 3, 2, class_token=False).
TWIN_VIT = TINY_VIT.model_copy(
    update={
        "image_size": 6,
        "patch_size": 3,
        "options": {**TINY_VIT.options, "embed_dim": 8, "depth": 1},
    }
)


@dataclass(frozen=True)
class Case:
    """An objective on a small model.

    Attributes:
        bf16_atol: absolute tolerance of a loss in bf16, where losses start near 0.
    """

    model: recipe.ModelConfig
    config: ObjectiveConfig
    bf16_atol: float = 0.0

    def build(self, seed: int = 0) -> Objective:
        torch.manual_seed(seed)
        return build_objective(self.model, self.config)


@dataclass(frozen=True)
class Twin:
    """An objective written once more, value by value, and where the two are compared.

    Attributes:
        loss: of the objective, which tells what is no weight, its weights, and a batch in fp64.
    """

    case: Case
    loss: Callable[[Any, Weights, Batch], Tensor]
    batch_size: int = 2


def module_of(kind: str) -> Any:
    """The test module of a kind, which holds its `CASES`, its `TWIN` and what its papers say, `PUBLISHED`."""
    return import_module(f"tests.objectives.test_{kind}")


def all_cases() -> dict[str, Case]:
    """Those of all kinds, by kind and what is special in them."""
    return {name: case for kind in KINDS for name, case in module_of(kind).CASES.items()}


def batch_for(needs: BatchSpec, size: int = 4, seed: int = 1, dtype: torch.dtype = torch.float32) -> Batch:
    """A batch that holds what `needs` asks for, and nothing else."""
    generator = torch.Generator().manual_seed(seed)
    shape = (size, 3, needs.image_size, needs.image_size)
    labels = masks = tokens = None
    if needs.num_classes is not None:
        labels = torch.randint(needs.num_classes, (size,), generator=generator)
    if needs.mask is not None:
        order = torch.rand(size, needs.mask.num_patches, generator=generator).argsort(1)
        masks = order < needs.mask.num_hidden
    if needs.tokens is not None:
        assert needs.tokens.vocab_size is not None
        shape_of_tokens = (size, needs.tokens.context_length)
        tokens = torch.randint(needs.tokens.vocab_size, shape_of_tokens, generator=generator)
    return Batch(
        keys=tuple(str(i) for i in range(size)),
        views=tuple(torch.randn(shape, generator=generator).to(dtype) for _ in range(needs.num_views)),
        labels=labels,
        masks=masks,
        tokens=tokens,
    )
