"""A training step under the engine against a bare PyTorch loop: the same model, batch, precision and cores.

    python -m tests.benchmarks.bench_step [--rounds 7] [--steps 3]

Loading is left out of both. The engine's step holds all that a run's does: seeding, the check that the loss and the
gradient are finite, clipping, the gradient's norm, the loss as a number on the host.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from data_pipeline.batch import Batch
from pretrain.engine.attention import choose_attention
from pretrain.engine.engine import Engine
from pretrain.objectives.blank import blank_batch as flops_batch
from pretrain.objectives.contract import Objective
from pretrain.objectives.kinds import build_objective
from pretrain.optim.optimizers import build_optimizer
from pretrain.recipe import recipe
from pretrain.recipe.files import load_recipe
from pretrain.runtime.collectives import World, process_group
from pretrain.runtime.native_precision import native_precision
from pretrain.runtime.state import Progress

RECIPE = "configs/recipes/cpu/mae_cifar10.yaml"
GOAL = 1.10


def run(rounds: int = 7, steps: int = 3, batch_size: int = 256) -> list[list[str]]:
    """Rows of the table: what, seconds a step, ratio to the bare loop with its spread over rounds."""
    config = benched()
    times: dict[str, list[float]] = {}
    with process_group(World(), torch.device("cpu")):
        contestants = {"bare": _bare(config, batch_size)}
        for stage in (0, 1, 2):
            contestants[f"ZeRO {stage}"] = _engine(config, stage, batch_size)
        for step in contestants.values():
            step()  # what is made once
        for _ in range(rounds):
            for name, step in contestants.items():
                start = time.perf_counter()
                for _ in range(steps):
                    step()
                times.setdefault(name, []).append((time.perf_counter() - start) / steps)
    rows = []
    for name, seconds in times.items():
        ratios = sorted(t / bare for t, bare in zip(seconds, times["bare"], strict=True))
        ratio = f"{statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})"
        goal = "" if name == "bare" else f"<= {GOAL:.2f}"
        rows.append([f"step, {name}", f"{statistics.median(seconds):.3f} s", ratio, goal])
    return rows


def benched() -> recipe.Recipe:
    """The recipe that is timed, in the precision that a run settles on this machine's CPU."""
    return load_recipe(RECIPE, [f"engine.precision={native_precision(torch.device('cpu'))}"])


def _objective(config: recipe.Recipe) -> Objective:
    torch.manual_seed(0)
    objective = build_objective(config.model, config.objective)
    choose_attention(objective, torch.device("cpu"), config.engine.settled_precision)
    return objective


def blank_batch(objective: Objective, size: int) -> Batch:
    """What the objective needs, of noise: in a batch of equal samples there would be nothing to contrast."""
    generator = torch.Generator().manual_seed(0)
    spec = objective.needs
    blank = flops_batch(spec, size)
    views = tuple(torch.randn(view.shape, generator=generator) for view in blank.views)
    tokens = blank.tokens
    if spec.tokens is not None:
        tokens = torch.randint(1, 400, (size, spec.tokens.context_length), generator=generator)
    return replace(blank, views=views, tokens=tokens)


def _bare(config: recipe.Recipe, size: int) -> Callable[[], float]:
    objective = _objective(config)
    optimizer = build_optimizer(objective, config.optim)
    for group in optimizer.param_groups:
        group["lr"] = 1e-4
    batch = blank_batch(objective, size)

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=config.engine.settled_precision == "bf16"):
            loss = objective(batch, Progress(0, 1, 0)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def engine_of(config: recipe.Recipe, stage: int, size: int, world: World) -> Engine:
    """The recipe's engine on the CPU, at a stage and for micro-batches of `size`."""
    objective = _objective(config)
    return Engine(
        objective,
        config.optim,
        config.engine.model_copy(update={"zero_stage": stage}),
        world=world,
        device=torch.device("cpu"),
        micro_size=size,
        accumulation=1,
        seed=0,
    )


def _engine(config: recipe.Recipe, stage: int, size: int) -> Callable[[], float]:
    engine = engine_of(config, stage, size, World())
    batch = blank_batch(engine.objective, size)
    return lambda: float(engine.step([batch], Progress(0, 1, 0), 1e-4).metrics["loss"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3)
    arguments = parser.parse_args()
    for row in run(arguments.rounds, arguments.steps):
        print("  ".join(row))
