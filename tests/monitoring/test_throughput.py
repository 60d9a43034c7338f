"""FLOPs of a sample against closed formulas, for each family of encoders; and the peak that they are measured by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.engine.attention import choose_attention
from pretrain.models.config import ModelConfig
from pretrain.monitoring import throughput
from pretrain.monitoring.throughput import Throughput, flops_per_sample
from pretrain.objectives.config import ObjectiveConfig, config_class
from pretrain.objectives.contract import Objective
from pretrain.objectives.kinds import build_objective
from pretrain.plan import build_on_meta
from pretrain.recipe.recipe import Model
from tests.objectives import towers
from tests.runs import logged, train, write_recipe
from tests.shards import write_shards

CPU = torch.device("cpu")
SMALL = {"embed_dim": 24, "depth": 3, "num_heads": 2}
VIT = Model(name="vit_tiny_patch16_224", image_size=32, patch_size=8, options=SMALL)
POOLED = VIT.model_copy(update={"options": {**SMALL, "class_token": False, "global_pool": "avg", "fc_norm": False}})
SWIN = Model(
    name="swin_tiny_patch4_window7_224", image_size=32, patch_size=2,
    options={"embed_dim": 8, "depths": (2, 1), "num_heads": (1, 2), "window_size": 4},
)  # fmt: skip


MAE = {"kind": "mae", "mask_ratio": 0.75, "decoder_width": 12, "decoder_depth": 1, "decoder_heads": 2}


def config(kind: str, **options: Any) -> ObjectiveConfig:
    return config_class(kind)(kind=kind, **options)


SUPERVISED = config("supervised", num_classes=5)


def block(tokens: int, width: int, *, window: int | None = None, mlp_ratio: float = 4) -> float:
    """Forward pass of a transformer block: four square matrices and the MLP's two, and attention's two products."""
    return 2 * tokens * width**2 * (4 + 2 * mlp_ratio) + 4 * tokens * (window or tokens) * width


def linear(rows: int, inputs: int, outputs: int) -> float:
    return 2 * rows * inputs * outputs


# A backward pass costs twice a forward pass, but for what stands on the image: its gradient is not asked for.
def vit(tokens: int, patches: int) -> float:
    return 3 * 3 * block(tokens, 24) + 2 * linear(patches, 3 * 8**2, 24)


def swin() -> float:
    first, second = 2 * block(256, 8, window=16), block(64, 16, window=16)
    return 3 * (first + linear(64, 4 * 8, 16) + second) + 2 * linear(256, 3 * 2**2, 8)


def resnet50(size: int) -> float:
    """Bottlenecks of 1x1, 3x3 and 1x1, the 3x3 with the stride; a stem of 7x7 at half the size, then pooled."""
    side, inputs, total = size // 4, 64, 0.0
    for stage, count in enumerate((3, 4, 6, 3)):
        width = 64 * 2**stage
        for number in range(count):
            out = side // (2 if stage and not number else 1)
            total += (
                linear(side**2, inputs, width) + linear(out**2, 9 * width, width) + linear(out**2, width, 4 * width)
            )
            total += 0 if number else linear(out**2, inputs, 4 * width)
            side, inputs = out, 4 * width
    return 3 * (total + linear(1, inputs, 5)) + 2 * linear((size // 2) ** 2, 3 * 7**2, 64)


def open_clip_tower(locked: bool) -> float:
    """Of 5 tokens of width 16 in two layers, the first of which is the class, and of a text of 6 such."""
    image = 2 * block(5, 16) + linear(1, 16, 8)
    stem = linear(4, 3 * 8**2, 16)
    text = 2 * block(6, 16) + linear(1, 16, 8)
    pairs = linear(2, 8, 2) / 2  # a sample's share of one product of both; there is one from each side
    if locked:  # of one of them, images are still multiplied by the scale, which learns
        return image + stem + (3 + 2) * pairs + 3 * text
    return 3 * image + 2 * stem + 2 * 3 * pairs + 3 * text


FORMULAS: dict[str, tuple[ModelConfig, ObjectiveConfig, float]] = {
    "ViT": (VIT, SUPERVISED, vit(17, 16) + 3 * linear(1, 24, 5)),
    "Swin": (SWIN, SUPERVISED, swin() + 3 * linear(1, 16, 5)),
    "ResNet": (Model(name="resnet50", image_size=64), SUPERVISED, resnet50(64)),
    "open_clip": (towers.OPEN_CLIP, config("clip"), open_clip_tower(locked=False)),
    "open_clip, locked": (towers.OPEN_CLIP, config("clip", lock_image=True), open_clip_tower(locked=True)),
    "MAE": (
        POOLED,
        config(**MAE),
        # Only the 4 patches that are seen go through the encoder; all through the decoder, and 12 to its head.
        3 * (3 * block(4, 24) + linear(4, 24, 12) + block(16, 12) + linear(12, 12, 3 * 8**2)) + 2 * linear(16, 192, 24),
    ),
}  # fmt: skip


def built(name: str) -> Objective:
    model, objective, _ = FORMULAS[name]
    torch.manual_seed(0)
    return build_objective(model, objective)


@pytest.mark.parametrize("sdpa", ["on", "off"])
@pytest.mark.parametrize("name", FORMULAS)
def test_flops_are_those_of_the_formula(name: str, sdpa: Any) -> None:
    objective = built(name)
    choose_attention(objective, CPU, "fp32", sdpa)
    assert flops_per_sample(objective) == pytest.approx(FORMULAS[name][2], rel=1e-9)


def test_a_run_counts_the_same_however_it_computes(tmp_path: Path) -> None:
    """Recomputed blocks and the first of two passes over micro-batches are no work of the model's."""
    shards = write_shards(tmp_path / "shards", 16)
    recipe = write_recipe(
        tmp_path / "recipe.yaml", shards, model=POOLED.model_dump(), schedule={"steps": 1},
        runtime={"peak_tflops": 0.5}, objective=MAE,
        batch={"global_size": 8, "micro_size": 4}, logging={"every_steps": 1, "tensorboard": False},
        engine={"precision": "fp32", "activation_checkpointing": "blocks"}, checkpoint={"every_steps": None},
    )  # fmt: skip
    train(recipe, tmp_path / "run")
    for values in logged(tmp_path / "run", "mfu", "images_per_second").values():
        assert values["mfu"] * 0.5e12 / values["images_per_second"] == pytest.approx(FORMULAS["MAE"][2], rel=1e-9)


def test_the_models_of_papers_cost_what_they_say() -> None:
    """Multiply-adds of a forward pass at 224 pixels, as torchvision and DeiT's code state them."""
    for name, multiply_adds in (("resnet50", 4.09e9), ("vit_base_patch16_224", 17.56e9)):
        objective = build_on_meta(Model(name=name, image_size=224), SUPERVISED)
        assert flops_per_sample(objective) == pytest.approx(6 * multiply_adds, rel=0.02), name


def test_the_setting_of_torch_is_left_as_it_was() -> None:
    assert torch.backends.mha.get_fastpath_enabled()
    flops_per_sample(built("open_clip"))
    assert torch.backends.mha.get_fastpath_enabled()


def test_the_peak_in_bf16_is_the_better_of_both(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that emulates bf16 has fp32's peak: part of a run is computed in it, and MFU would be above 1."""
    peaks = {torch.float32: 4e11, torch.bfloat16: 1e11}
    monkeypatch.setattr(throughput, "measure_peak_flops", lambda device, dtype: peaks[dtype])
    assert Throughput(1e9, CPU, 1, "bf16", None).peak == 4e11
    assert Throughput(1e9, CPU, 2, "fp32", None)(80.0)["mfu"] == pytest.approx(0.1)
    peaks[torch.bfloat16] = 9e11
    assert Throughput(1e9, CPU, 1, "bf16", None).peak == 9e11
    assert Throughput(1e9, CPU, 1, "fp32", None).peak == 4e11
    assert Throughput(1e9, CPU, 1, "bf16", 2.0).peak == 2e12
