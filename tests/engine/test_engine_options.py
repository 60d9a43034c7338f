"""Options of the engine change how a step is computed and what it costs, never what comes out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from data_pipeline.batch import Batch
from data_pipeline.errors import InputError
from pretrain.checkpoints import checkpoint
from pretrain.engine.engine import Engine
from pretrain.models.blocks import repeated_blocks
from pretrain.objectives.contract import Objective
from pretrain.objectives.kinds import build_objective
from pretrain.objectives.mae.config import MaeConfig
from pretrain.objectives.supervised.config import SupervisedConfig
from pretrain.recipe import recipe
from pretrain.recipe.recipe import EngineConfig
from pretrain.runtime.collectives import World
from pretrain.runtime.state import Progress, RunState
from tests.checkpoints.test_checkpoint import save
from tests.engine.test_engine import make_engine, part, whole_state
from tests.ranks import run_ranks

VIT = recipe.Model(
    name="vit_tiny_patch16_224",
    image_size=16,
    patch_size=4,
    options={
        "embed_dim": 24, "depth": 3, "num_heads": 3, "class_token": False, "global_pool": "avg", "fc_norm": False,
        "drop_path_rate": 0.3, "proj_drop_rate": 0.1,
    },
)  # fmt: skip
STILL = VIT.model_copy(update={"options": {**VIT.options, "drop_path_rate": 0.0, "proj_drop_rate": 0.0}})
MAE = MaeConfig(kind="mae", decoder_width=16, decoder_depth=2, decoder_heads=2)
MODELS = {
    "mae, nothing dropped": (STILL, MAE),
    "mae": (VIT, MAE),
    "resnet": (
        recipe.Model(name="test_resnet", image_size=16),
        SupervisedConfig(kind="supervised", num_classes=3),
    ),
}
CHECKPOINTED = {"activation_checkpointing": "blocks"}
OFFLOADED = {**CHECKPOINTED, "offload_activations": True}


def build(kind: str, seed: int = 0) -> Objective:
    torch.manual_seed(seed)
    return build_objective(*MODELS[kind])


def batch_of(kind: str, at: int) -> Batch:
    generator = torch.Generator().manual_seed(at)
    return Batch(
        keys=tuple("abcdefgh"),
        views=(torch.randn(8, 3, 16, 16, generator=generator),),
        labels=torch.randint(0, 3, (8,), generator=generator),
        masks=torch.rand(8, 16, generator=generator).argsort(1) < 12 if kind.startswith("mae") else None,
    )


def steps(engine: Engine, world: World, kind: str, first: int = 0, num: int = 3) -> list[float]:
    size = 8 // world.size
    return [
        float(
            engine.step([part(batch_of(kind, at), world.rank * size, size)], Progress(at, 9, 0), 1e-3).metrics["loss"]
        )
        for at in range(first, first + num)
    ]


def outcome(world: World, kind: str, precision: str, stage: int, options: dict[str, Any]) -> dict[str, Any]:
    """Losses of 3 steps and of an evaluation; AdamW's first moments after one step are a tenth of the gradient."""
    engine = make_engine(world, stage, objective=build(kind), precision=precision, options=options)
    layouts = []
    convolution = next(m for m in engine.objective.modules() if isinstance(m, nn.Conv2d))
    convolution.register_forward_hook(
        lambda _, __, output: layouts.append(output.is_contiguous(memory_format=torch.channels_last))
    )
    losses = steps(engine, world, kind, num=1)
    after_one = {k: v for k, v in whole_state(engine).items() if k.startswith(("optim/exp_avg/", "buffer/"))}
    losses += steps(engine, world, kind, first=1, num=2)
    losses.append(float(engine.evaluate(part(batch_of(kind, 9), 0, 4), Progress(3, 9, 0)).loss))
    return {"losses": losses, "after_one": after_one, "channels_last": all(layouts)}


OPTIONS: dict[str, tuple[int, dict[str, Any]]] = {
    "checkpointing": (0, CHECKPOINTED),
    "checkpointing at ZeRO 3": (3, CHECKPOINTED),
    "offloaded activations": (1, OFFLOADED),
    "channels_last": (1, {"channels_last": True}),
    "fused AdamW": (2, {"fused_adamw": True}),
    "TF32, which a CPU has not": (0, {"tf32": True}),
    "optimizer offload, ZeRO 1": (1, {"offload_optimizer": True}),
    "optimizer offload, ZeRO 2": (2, {"offload_optimizer": True}),
    "optimizer offload, ZeRO 3": (3, {"offload_optimizer": True, "fused_adamw": True}),
}


def outcomes(world: World, kind: str, precision: str) -> dict[str, Any]:
    """ZeRO 3 last: DeepSpeed then replaces torch's `linear` for the rest of the process, which rounds otherwise."""
    runs: list[tuple[str, int, dict[str, Any]]] = [(f"ZeRO {stage}", stage, {}) for stage in (0, 1, 2, 3)]
    runs += [(name, stage, options) for name, (stage, options) in OPTIONS.items()]
    runs.sort(key=lambda run: run[1])
    return {name: outcome(world, kind, precision, stage, options) for name, stage, options in runs}


@pytest.mark.parametrize(("kind", "precision"), [("mae", "bf16"), ("resnet", "fp32")])
def test_options_leave_losses_gradients_and_statistics_as_they_are(kind: str, precision: str) -> None:
    """Dropout and drop path are on; running statistics move once a step."""
    found = run_ranks(outcomes, 2, kind, precision)[0]
    assert [name for name, run in found.items() if run["channels_last"]] == ["channels_last"]
    for name, (stage, _) in OPTIONS.items():
        expected = found[f"ZeRO {stage}"]
        assert found[name]["losses"][0] == pytest.approx(expected["losses"][0], rel=1e-6), name
        assert found[name]["losses"] == pytest.approx(expected["losses"], rel=1e-3), name
        whole = torch.cat([v.flatten() for v in expected["after_one"].values()]).norm()
        for key, value in expected["after_one"].items():
            error = (found[name]["after_one"][key] - value).double().norm()
            assert error <= 1e-5 * max(value.double().norm(), 1e-2 * whole), (name, key)


def offload_and_back(world: World, folder: Path) -> dict[str, Any]:
    """A state handed on: ZeRO 1 -> offloaded at 2 -> offloaded at 3 -> offloaded at 1 -> ZeRO 0."""
    digests, losses = [], []
    source: Path | None = None
    for hop, (stage, offload) in enumerate([(1, False), (2, True), (3, True), (1, True), (0, False)]):
        engine = make_engine(world, stage, objective=build("mae", seed=hop), options={"offload_optimizer": offload})
        if source is None:
            steps(engine, world, "mae")
        else:
            steps(engine, world, "mae", first=50)
            checkpoint.load(checkpoint.open_checkpoint(source, world), engine.state)
        save(folder / str(hop), engine, RunState(Progress(3, 9, 0)), world)
        source = folder / str(hop) / checkpoint.folder_name(3)
        digests.append(checkpoint.digests(source) if world.is_main else {})
        losses.append(steps(engine, world, "mae", first=3))
    return {"digests": digests, "losses": losses}


def test_checkpoints_do_not_know_where_the_optimizer_lies(tmp_path: Path) -> None:
    found = run_ranks(offload_and_back, 2, tmp_path)[0]
    for digests, losses in zip(found["digests"], found["losses"], strict=True):
        assert digests == found["digests"][0]
        torch.testing.assert_close(losses, found["losses"][0], rtol=1e-5, atol=0)


@pytest.mark.parametrize(("kind", "count"), [("mae", 5), ("resnet", 4)])
def test_every_repeated_block_is_found(kind: str, count: int) -> None:
    blocks = repeated_blocks(build(kind))
    assert len(blocks) == count
    assert not any(a.startswith(f"{b}.") for a in blocks for b in blocks)


def without_blocks(world: World) -> list[str]:
    messages = []
    for options in (CHECKPOINTED, {"compile": True}):
        with pytest.raises(InputError) as caught:
            make_engine(world, 0, options=options)
        messages.append(str(caught.value))
    return messages


def test_a_model_without_blocks_is_refused() -> None:
    (first, second), *_ = run_ranks(without_blocks, 1)
    assert "engine.activation_checkpointing" in first
    assert "engine.compile" in second


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"offload_activations": True}, "activation_checkpointing blocks"),
        ({"offload_optimizer": True, "zero_stage": 0}, "zero_stage 1, 2 or 3"),
        ({"compile": True, "zero_stage": 3}, "with compile"),
        ({"compile": True, **CHECKPOINTED}, "with compile"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        EngineConfig(**options)
