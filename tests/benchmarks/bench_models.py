"""Whole models on one device, by their recipes: images per second and MFU, beside a bare loop.

    python -m tests.benchmarks.bench_models --recipe configs/recipes/mae_vit_b16.yaml --batch 256
    python -m tests.benchmarks.bench_models --recipe configs/recipes/clip_vit_b16.yaml --batch 256
    python -m tests.benchmarks.bench_models --recipe configs/recipes/byol_resnet50.yaml --batch 256

All in one process and one run, in rounds, each against the bare loop of its round: the recipe's objective under
autocast with torch's AdamW. An image is a sample, whatever views of it there are. For MAE, timm's own supervised step
stands beside: it sees every patch where MAE sees a quarter, so its images per second are no measure for MAE's; its MFU
is.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from torch import Tensor

from data_pipeline.batch import Batch
from pretrain.engine.engine import Engine
from pretrain.monitoring.throughput import flops_per_sample, measure_peak_flops
from pretrain.objectives.contract import Objective
from pretrain.objectives.kinds import build_objective
from pretrain.objectives.supervised.config import SupervisedConfig
from pretrain.optim.adamw.config import AdamW
from pretrain.recipe.files import load_recipe
from pretrain.recipe.recipe import EngineConfig, Recipe
from pretrain.runtime.collectives import World, process_group
from pretrain.runtime.state import Progress
from tests.benchmarks.bench_step import blank_batch

VARIANTS = {
    "ZeRO 1": {},
    "ZeRO 1, sdpa off": {"sdpa": "off"},
    "ZeRO 1, channels_last": {"channels_last": True},
    "ZeRO 1, fused AdamW": {"fused_adamw": True},
    "ZeRO 1, compile": {"compile": True},
}


@dataclass(frozen=True)
class Contestant:
    step: Callable[[], float]
    flops: float  # of a sample


def run(recipe: Recipe, batch_size: int, device: torch.device, rounds: int, steps: int) -> list[list[str]]:
    """Rows of the table: what, images/s, MFU, ratio to the bare loop with its spread over rounds."""
    peak = measure_peak_flops(device, torch.bfloat16)
    times: dict[str, list[float]] = {}
    with process_group(World(), device):
        contestants = {"bare loop": _bare(recipe, batch_size, device)}
        if recipe.objective.kind == "mae":
            contestants["timm, supervised"] = _timm(recipe, batch_size, device)
        for name, options in VARIANTS.items():
            contestants[name] = _ours(recipe, batch_size, device, EngineConfig(precision="bf16", **options))
        for contestant in contestants.values():
            for _ in range(3):
                contestant.step()  # what is made once, and compiled
        for _ in range(rounds):
            for name, contestant in contestants.items():
                start = time.perf_counter()
                for _ in range(steps):
                    contestant.step()  # returns a number, so the device is waited for
                times.setdefault(name, []).append((time.perf_counter() - start) / steps)
    rows = []
    for name, seconds in times.items():
        rates = [batch_size / second for second in seconds]
        ratios = sorted(bare / second for second, bare in zip(seconds, times["bare loop"], strict=True))
        mfu = statistics.median(rates) * contestants[name].flops / peak
        spread = f"{statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})"
        rows.append([f"{recipe.name}, {name}", f"{statistics.median(rates):.0f}", f"{mfu:.1%}", spread])
    return rows


def _objective(recipe: Recipe, device: torch.device) -> Objective:
    torch.manual_seed(0)
    return build_objective(recipe.model, recipe.objective).to(device)


def _bare(recipe: Recipe, size: int, device: torch.device) -> Contestant:
    objective = _objective(recipe, device)
    trained = [p for p in objective.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05)
    batch = blank_batch(objective, size).to(device)
    return Contestant(
        _loop(lambda: objective(batch, Progress(0, 1, 0)).loss, optimizer, device), flops_per_sample(objective)
    )


def _timm(recipe: Recipe, size: int, device: torch.device) -> Contestant:
    model = recipe.model
    torch.manual_seed(0)
    net = timm.create_model(model.name, img_size=model.image_size, num_classes=1000).to(device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4)
    images = torch.randn(size, 3, model.image_size, model.image_size, device=device)
    labels = torch.zeros(size, dtype=torch.int64, device=device)
    counted = build_objective(model, SupervisedConfig(kind="supervised", num_classes=1000))
    return Contestant(
        _loop(lambda: torch.nn.functional.cross_entropy(net(images).float(), labels), optimizer, device),
        flops_per_sample(counted),
    )


def _loop(loss_of: Callable[[], Tensor], optimizer: torch.optim.Optimizer, device: torch.device) -> Callable[[], float]:
    def step() -> float:
        with torch.autocast(device.type, torch.bfloat16):
            loss = loss_of()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def _ours(recipe: Recipe, size: int, device: torch.device, config: EngineConfig) -> Contestant:
    objective = _objective(recipe, torch.device("cpu"))
    flops = flops_per_sample(objective)
    engine = Engine(
        objective,
        AdamW(base_lr=1e-4),
        config,
        world=World(),
        device=device,
        micro_size=size,
        accumulation=1,
        seed=0,
    )
    batch: Batch = blank_batch(objective, size).to(device)
    return Contestant(lambda: float(engine.step([batch], Progress(0, 1, 0), 1e-4).metrics["loss"]), flops)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", type=Path, default=Path("configs/recipes/mae_vit_b16.yaml"))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="Override of the recipe.")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=5)
    given = parser.parse_args()
    recipe = load_recipe(given.recipe, given.set)
    print("what | images/s | MFU | against the bare loop")
    for row in run(recipe, given.batch, torch.device(given.device), given.rounds, given.steps):
        print(" | ".join(row))


if __name__ == "__main__":
    main()
