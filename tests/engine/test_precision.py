"""The precision that a run settles on, what it keeps of it, and bf16 that is tried before it is trusted."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from data_pipeline.batch import Batch, BatchSpec
from data_pipeline.errors import InputError
from launch.doctor import precision as doctor
from pretrain.engine import precision
from pretrain.engine.precision import (
    kept_precision,
    refuse_wrong_bf16,
    settle_precision,
    wrong_bf16_gradients,
)
from pretrain.objectives.contract import LossOutput, Objective
from pretrain.objectives.kinds import build_objective
from pretrain.recipe.files import load_recipe
from pretrain.recipe.recipe import EngineConfig, Recipe
from pretrain.runtime.native_precision import cpu_has_bf16, native_precision
from pretrain.runtime.state import Progress
from tests.objectives.cases import module_of
from tests.runs import train, write_recipe
from tests.shards import write_shards

CPU = torch.device("cpu")


class Wrong(torch.autograd.Function):
    """Half of a weight's gradient is whatever the memory held, in bf16 alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, garbage: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.garbage = garbage if torch.is_autocast_enabled("cpu") else 1.0
        return x * weight

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        return grads[0], (grads[0] * x).sum().reshape(1) * ctx.garbage, None


class Scaled(Objective):
    """A convolution, then a scale whose gradient is wrong by a factor in bf16."""

    def __init__(self, garbage: float) -> None:
        super().__init__()
        self.needs, self.garbage = BatchSpec(4), garbage
        self.encoder = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.scale = nn.Parameter(torch.tensor([2.0]))

    def forward(self, batch: Batch, progress: Progress) -> LossOutput:
        found = Wrong.apply(self.encoder(batch.views[0]).float(), self.scale, self.garbage)
        return LossOutput(found.square().mean())


def written(folder: Path, **engine: Any) -> Recipe:
    return load_recipe(write_recipe(folder / "recipe.yaml", folder / "shards", engine={"zero_stage": 0, **engine}))


@pytest.mark.parametrize(
    ("cpuinfo", "native"),
    [
        ("flags\t\t: fpu avx512f avx512_bf16\nflags\t\t: fpu avx512f avx512_bf16\n", True),
        ("flags\t\t: fpu amx_bf16 amx_tile\n", True),
        ("Features\t: fp asimd bf16 i8mm\n", True),
        ("flags\t\t: fpu avx512f\n", False),
        ("flags\t\t: fpu avx512_bf16\nflags\t\t: fpu avx2\n", False),
        ("vmx flags\t: bf16\nprocessor : 0\n", False),
        ("", False),
    ],
)
def test_a_cpu_says_whether_it_has_instructions_for_bf16(cpuinfo: str, native: bool) -> None:
    assert cpu_has_bf16(cpuinfo) == native


@pytest.mark.parametrize("native", ["fp32", "bf16"])
def test_auto_is_the_default_and_settles_as_the_device_is(
    native: Literal["fp32", "bf16"], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert EngineConfig().precision == "auto"
    monkeypatch.setattr(precision, "native_precision", lambda device: native)
    objective = Scaled(1.0)
    assert (
        settle_precision(written(tmp_path).engine, None, objective, CPU, tmp_path / "run").settled_precision == native
    )
    for asked in ("fp32", "bf16"):
        recipe = written(tmp_path, precision=asked)
        assert settle_precision(recipe.engine, None, objective, CPU, tmp_path / "run") == recipe.engine
    with pytest.raises(AssertionError, match=r"engine\.precision"):
        _ = written(tmp_path).engine.settled_precision


def test_a_run_keeps_what_it_settled_on_whatever_the_machine(tmp_path: Path) -> None:
    """It began in what this CPU would not settle on, and goes on in it without being told."""
    write_shards(tmp_path / "shards", 16)
    native = native_precision(CPU)
    other = "fp32" if native == "bf16" else "bf16"
    out, path = tmp_path / "run", tmp_path / "recipe.yaml"
    recipe = write_recipe(
        path, tmp_path / "shards", schedule={"steps": 2}, checkpoint={"every_steps": 1}, engine={"zero_stage": 0}
    )
    assert f"ZeRO 0, {other}, 1 x cpu" in train(recipe, out, 1, f"engine.precision={other}", max_steps=1)
    assert train(recipe, out).count(f"ZeRO 0, {other}, 1 x cpu") == 2
    assert f"ZeRO 0, {native}, 1 x cpu" in train(recipe, tmp_path / "new", max_steps=1)
    for run, settled in ((out, other), (tmp_path / "new", native)):
        for name in ("recipe.yaml", "resolved.yaml"):
            assert f"precision: {settled}\n" in (run / name).read_text()
    assert kept_precision(None, out) == other
    assert kept_precision(None, tmp_path / "other") is None
    for resumed in (out, out / "checkpoints" / "step_00000002"):
        assert kept_precision(str(resumed), tmp_path / "other") == other
    shutil.rmtree(out / "checkpoints")
    assert kept_precision(None, out) is None  # nothing is gone on with: it begins anew


@pytest.mark.parametrize("garbage", [3.0, float("nan"), float("inf")])
def test_gradients_that_part_in_bf16_are_refused_by_name(garbage: float) -> None:
    assert wrong_bf16_gradients(Scaled(1.0)) == []
    with pytest.raises(InputError, match=r"(?s)engine\.precision.*the norm of scale \(.* where fp32 has .*=fp32"):
        refuse_wrong_bf16(Scaled(garbage))


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("supervised", "supervised, resnet"),
        ("simmim", "simmim, swin v2"),
        ("sum", "sum, with a teacher"),
        ("byol", "byol, vit"),
        ("clip", "clip"),
    ],
)
def test_what_is_right_passes_and_is_left_as_it_was(kind: str, name: str) -> None:
    case = module_of(kind).CASES[name]
    torch.manual_seed(0)
    objective = build_objective(case.model, case.config)
    before, state = torch.get_rng_state(), {key: value.clone() for key, value in objective.state_dict().items()}
    assert wrong_bf16_gradients(objective) == []
    assert torch.equal(torch.get_rng_state(), before)
    assert objective.training
    assert all(torch.equal(value, state[key]) for key, value in objective.state_dict().items())
    assert all(p.grad is None for p in objective.parameters())


def test_memory_that_a_kernel_leaves_unwritten_is_not_zero_by_chance() -> None:
    """Where this CPU's kernel for a strided convolution over one pixel is the wrong one, it is found."""
    conv, x = nn.Conv2d(64, 128, 3, stride=2, padding=1, bias=False), torch.randn(8, 64, 1, 1)
    y = conv(x)
    seed = torch.randn_like(y)
    (right,) = torch.autograd.grad(y, conv.weight, seed)
    wrong = False
    for _ in range(5):
        blocks = [torch.full((conv.weight.numel() * 4,), 255, dtype=torch.uint8) for _ in range(12)]
        del blocks
        with torch.autocast("cpu", torch.bfloat16):
            y = conv(x)
        (found,) = torch.autograd.grad(y, conv.weight, seed.bfloat16())
        wrong |= not float((found - right).norm()) < 0.1 * float(right.norm())
    if not wrong:
        pytest.skip("this CPU, or this build of torch, computes it rightly")
    case = module_of("supervised").CASES["supervised, resnet"]
    small = case.model.model_copy(update={"image_size": 8})
    torch.manual_seed(0)
    objective = build_objective(small, case.config)
    assert any(wrong_bf16_gradients(objective) for _ in range(3))


def test_the_doctor_says_what_a_run_would_compute_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def said(precision: str = "auto", garbage: float = 1.0) -> tuple[str, str]:
        (finding,) = doctor.precision(precision, "cpu", None, tmp_path / "run", lambda: Scaled(garbage))
        return finding.level, str(finding)

    monkeypatch.setattr(doctor, "native_precision", lambda device: "fp32")
    assert said()[0] == "ok"
    assert "fp32 (auto); this CPU has no instructions for bf16" in said()[1]
    level, text = said(precision="bf16")
    assert level == "warning"
    assert "several times as long as in fp32" in text
    assert said(precision="fp32")[0] == "ok"
    monkeypatch.setattr(doctor, "native_precision", lambda device: "bf16")
    assert "bf16 (auto); this CPU has instructions for bf16" in said()[1]
    level, text = said(garbage=float("nan"))
    assert level == "error"
    assert "engine.precision: expected bf16 with the gradients of fp32" in text
    assert said("fp32", float("nan"))[0] == "ok"
