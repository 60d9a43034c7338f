"""START HERE: from a recipe to the objects that train it, and into the loop.

`preflight` answers wrong input before anything is started or written; `run` is what every rank calls.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

import torch

from data_pipeline.assemble import check
from data_pipeline.batch import Batch, BatchSpec
from data_pipeline.errors import RecipeError
from data_pipeline.loader import StepData, TrainLoader
from data_pipeline.read import Dataset, open_dataset
from data_pipeline.views import ViewSpec
from pretrain import checkpoint
from pretrain.augment import normalize
from pretrain.collectives import World, barrier, process_group
from pretrain.engine import Engine
from pretrain.environment import choose_device, describe, pin_threads
from pretrain.inline import Inline, knn_evaluators
from pretrain.loop import Limits, Parts, TimedCheckpoints, train
from pretrain.metrics import MetricLog, flops_per_sample, measure_peak_flops, peak_memory_bytes
from pretrain.models.encoders import save_encoder
from pretrain.objectives.base import Objective
from pretrain.objectives.build import build_objective
from pretrain.recipe import Recipe
from pretrain.recipe_io import dump, load_recipe, resolved_yaml
from pretrain.resolve import Resolved, differences, resolve
from pretrain.schedules import learning_rate
from pretrain.state import Progress, RunState
from pretrain.strict_yaml import read_yaml


@dataclass(frozen=True)
class Plan:
    """What was found to be right before anything started."""

    train: Dataset
    val: Dataset | None
    needs: BatchSpec
    resolved: Resolved


def preflight(recipe: Recipe, world_size: int, out: Path) -> Plan:
    """Checks the recipe against its data, the number of ranks and the run's folder; writes nothing.

    Raises:
        InputError: of whichever is wrong.
    """
    train_data = open_dataset(recipe.data.train)
    resolved = resolve(recipe, world_size, train_data.num_samples)
    with torch.device("meta"):  # the shapes alone
        needs = build_objective(recipe.model, recipe.objective).needs
    check(train_data, needs)
    val = open_dataset(recipe.data.val) if recipe.data.val else None
    if val is not None:
        check(val, needs)
    knn_evaluators(recipe)
    _refuse_other_run(recipe, train_data, out)
    return Plan(train_data, val, needs, resolved)


def run(recipe: Recipe, out: Path, *, max_steps: int | None = None, overfit_batch: bool = False) -> None:
    """Trains, or goes on with the run in `out`; every rank calls it with the same arguments.

    Args:
        recipe: of the run.
        out: the run's folder.
        max_steps: stop after so many applied steps; started again without it, the run goes on.
        overfit_batch: train on the first batch only, from scratch, in a folder beside `out`.

    Raises:
        InputError: something given is wrong; nothing was changed.
        RunError: the run failed.
    """
    world = World.from_environment()
    device = choose_device(recipe.runtime, world)
    threads = pin_threads(recipe.runtime, world)
    if overfit_batch:
        out = out.with_name(out.name + "-overfit")
    plan = preflight(recipe, world.size, out)
    with process_group(world, device):
        torch.manual_seed(recipe.seed)
        objective = build_objective(recipe.model, recipe.objective)
        rates = _Rates(recipe, objective, device, world)
        engine = Engine(
            objective,
            recipe.optim,
            recipe.engine,
            world=world,
            device=device,
            micro_size=plan.resolved.micro_size,
            accumulation=plan.resolved.accumulation,
            seed=recipe.seed,
        )
        checkpoints = out / "checkpoints"
        latest = None if overfit_batch else next(reversed(checkpoint.complete_checkpoints(checkpoints)), None)
        barrier()  # all have looked before anyone writes
        state = RunState(Progress(0, plan.resolved.total_steps, 0))
        if latest is not None:
            state = checkpoint.load(latest, engine, world=world)
        if world.is_main:
            _describe_run(out, recipe, plan, describe(world, device, threads))
        log = MetricLog(
            out,
            step=state.progress.step,
            total_steps=plan.resolved.total_steps,
            active=world.is_main,
            tensorboard=recipe.logging.tensorboard,
        )
        log.say(_opening(recipe, plan, state, world, device, latest))

        def write(state: RunState) -> None:
            encoder = engine.materialize(objective.encoder)
            if world.is_main:
                data = recipe.data
                save_encoder(out / "encoder", encoder, recipe.model, data.mean, data.std, data.views)
            if not overfit_batch:
                keep_last = recipe.checkpoint.keep_last
                log.say(f"saved {checkpoint.save(checkpoints, engine, state, world=world, keep_last=keep_last)}")

        def prepare(batch: Batch) -> Batch:
            return normalize(batch.to(device), recipe.data.mean, recipe.data.std)

        inline = Inline(recipe, plan.val, engine, objective, prepare, world, out)
        parts = Parts(
            engine=engine,
            steps=_steps(recipe, plan, world, state.cursor, overfit_batch),
            prepare=prepare,
            learning_rate=lambda progress: learning_rate(
                progress, recipe.schedule, peak_lr=plan.resolved.peak_lr, warmup_steps=plan.resolved.warmup_steps
            ),
            log=log,
            rates=rates,
            evaluations=inline.periodic(plan.resolved.steps_per_epoch),
            checkpoints=TimedCheckpoints(
                write,
                every_steps=recipe.checkpoint.every_steps,
                every_minutes=recipe.checkpoint.every_minutes,
                log_every=recipe.logging.every_steps,
            ),
            limits=Limits(recipe.data.max_bad_samples, recipe.runtime.max_skipped_steps),
            log_every=recipe.logging.every_steps,
        )
        total_steps = plan.resolved.total_steps
        state = train(state, parts, stop_at=min(total_steps, max_steps or total_steps))
        done = "finished" if state.progress.step == total_steps else "stopped"
        log.say(f"{done} at step {state.progress.step} of {total_steps}; the encoder is in {out / 'encoder'}")
        log.close()


def _steps(recipe: Recipe, plan: Plan, world: World, cursor: int, overfit_batch: bool) -> Iterator[StepData]:
    data, views = recipe.data, recipe.data.views
    loader = TrainLoader(
        plan.train,
        plan.needs,
        ViewSpec(**views.model_dump()),
        seed=recipe.seed,
        lanes=data.lanes,
        window=data.window,
        global_size=recipe.batch.global_size,
        micro_size=plan.resolved.micro_size,
        rank=world.rank,
        world_size=world.size,
        num_workers=recipe.runtime.num_workers,
        max_pixels=data.max_pixels,
    )
    if not overfit_batch:
        return loader.steps(cursor)
    first = next(loader.steps(0))
    return (replace(first, cursor=first.cursor * step) for step in count(1))


class _Rates:
    """Samples per second -> MFU and memory; FLOPs are counted and the peak measured once, before training."""

    def __init__(self, recipe: Recipe, objective: Objective, device: torch.device, world: World) -> None:
        self._flops, self._device, self._world = flops_per_sample(objective), device, world
        stated = recipe.runtime.peak_tflops
        dtype = torch.bfloat16 if recipe.engine.precision == "bf16" else torch.float32
        self.peak = stated * 1e12 if stated else measure_peak_flops(device, dtype)

    def __call__(self, images_per_second: float) -> dict[str, float]:
        return {
            "mfu": images_per_second * self._flops / (self.peak * self._world.size),
            "memory_bytes": float(peak_memory_bytes(self._device)),
        }


def _refuse_other_run(recipe: Recipe, train_data: Dataset, out: Path) -> None:
    """A folder goes on with its own run only: what changes results must be what it was, the data included."""
    given, resolved = out / "recipe.yaml", out / "resolved.yaml"
    if not given.is_file():
        return
    problems = differences(recipe, load_recipe(given))
    if not problems and resolved.is_file():
        kept = read_yaml(resolved.read_text())[0].get("data_fingerprint")
        if kept != train_data.fingerprint:
            problems = [f"data.train: expected the data with fingerprint {kept}, found {train_data.fingerprint}."]
    if problems:
        problems.append("Choose another folder with --out, or take this run's own recipe.")
        raise RecipeError(f"{out} holds another run", problems)


def _describe_run(out: Path, recipe: Recipe, plan: Plan, environment: str) -> None:
    out.mkdir(parents=True, exist_ok=True)
    resolved = f"{resolved_yaml(recipe, plan.resolved)}data_fingerprint: {plan.train.fingerprint}\n"
    # The recipe last: it is what makes the folder this run's.
    for name, text in (("environment.json", environment), ("resolved.yaml", resolved), ("recipe.yaml", dump(recipe))):
        part = out / f".{name}.{os.getpid()}"
        part.write_text(text)
        part.replace(out / name)


def _opening(
    recipe: Recipe, plan: Plan, state: RunState, world: World, device: torch.device, latest: Path | None
) -> str:
    size = f"{plan.resolved.global_size} = {world.size} x {plan.resolved.accumulation} x {plan.resolved.micro_size}"
    start = f"from {latest}" if latest else "from scratch"
    return (
        f"{recipe.name}: {recipe.objective.kind} {recipe.model.name}, {plan.train.num_samples} samples, "
        f"batch {size}, ZeRO {recipe.engine.zero_stage}, {recipe.engine.precision}, {world.size} x {device.type}; "
        f"steps {state.progress.step} to {plan.resolved.total_steps}, {start}"
    )
