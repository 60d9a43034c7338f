"""START HERE: from a recipe to the objects that train it, and into the loop.

`preflight` answers wrong input before anything is started or written; `run` is what every rank calls.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

import torch

from data_pipeline.assemble import check
from data_pipeline.batch import Batch, BatchSpec
from data_pipeline.captions import Captions
from data_pipeline.errors import DataError, RecipeError, RunError
from data_pipeline.loader import StepData, TrainLoader
from data_pipeline.mixture import open_training
from data_pipeline.prefetch import check_room
from data_pipeline.read import Dataset, open_dataset
from data_pipeline.views import ViewSpec
from pretrain.augment import augmentations, mixing, prepare
from pretrain.checkpoint import load, module_state
from pretrain.checkpoint_writer import CheckpointWriter
from pretrain.collectives import World, process_group
from pretrain.engine import Engine
from pretrain.environment import choose_device, describe, pin_threads
from pretrain.inline import Inline, knn_evaluators
from pretrain.loop import Limits, Parts, train
from pretrain.metrics import MetricLog, flops_per_sample, measure_peak_flops, peak_memory_bytes
from pretrain.models.attention import choose_attention
from pretrain.models.encoders import save_encoder
from pretrain.models.tokenizers import build_tokenizer
from pretrain.objectives.base import Objective
from pretrain.objectives.build import build_objective
from pretrain.recipe import Recipe
from pretrain.recipe_io import dump, load_recipe, resolved_yaml
from pretrain.resolve import Resolved, is_longer, resolve
from pretrain.saving import Demand, TimedCheckpoints
from pretrain.schedules import learning_rate
from pretrain.start import Start, find_start, refuse_other_run
from pretrain.state import Progress, RunState
from pretrain.strict_yaml import read_yaml


@dataclass(frozen=True)
class Plan:
    """What was found to be right before anything started."""

    train: Dataset
    val: Dataset | None
    needs: BatchSpec
    captions: Captions | None
    resolved: Resolved


def preflight(recipe: Recipe, world_size: int, out: Path) -> Plan:
    """Checks the recipe against its data, the number of ranks and the run's folder; writes nothing.

    Raises:
        InputError: of whichever is wrong.
    """
    cache = recipe.data.cache.spec()
    train_data = open_training(recipe.data.train, cache)
    resolved = resolve(recipe, world_size, train_data.num_samples)
    with torch.device("meta"):  # the shapes alone
        objective = build_objective(recipe.model, recipe.objective)
    needs = objective.needs
    _refuse_split_batch_norm(recipe, objective, resolved)
    augmentations(recipe, needs)
    mixing(recipe, needs, resolved.micro_size)
    captions = _captions(recipe, needs)
    check(train_data, needs, captions)
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    check_room(
        train_data,
        lanes=recipe.data.lanes,
        window=recipe.data.window,
        world_size=world_size,
        local_size=local_size,
    )
    val = open_dataset(recipe.data.val, cache) if recipe.data.val else None
    if val is not None:
        check(val, needs, captions)
    knn_evaluators(recipe)
    refuse_other_run(recipe, train_data.fingerprint, resolved.total_steps, out)
    return Plan(train_data, val, needs, captions, resolved)


def _captions(recipe: Recipe, needs: BatchSpec) -> Captions | None:
    if needs.tokens is None:
        return None
    return Captions(build_tokenizer(needs.tokens), **recipe.data.captions.model_dump())


def folder_of(out: Path, overfit_batch: bool) -> Path:
    """Where a run is kept: a trial on one batch lies beside the run that it is a trial of."""
    return out.with_name(f"{out.name}-overfit") if overfit_batch else out


def run(recipe: Recipe, out: Path, *, max_steps: int | None = None, overfit_batch: bool = False) -> None:
    """Trains, or goes on with the run in `out`; every rank calls it with the same arguments.

    Args:
        recipe: of the run.
        out: the run's folder.
        max_steps: stop after so many applied steps; started again without it, the run goes on.
        overfit_batch: train on the first batch only, from scratch, in `folder_of(out, True)`.

    Raises:
        InputError: something given is wrong; nothing was changed.
        RunError: the run failed.
    """
    world = World.from_environment()
    device = choose_device(recipe.runtime, world)
    threads = pin_threads(recipe.runtime, world)
    out = folder_of(out, overfit_batch)
    plan = preflight(recipe, world.size, out)
    job = _Job(recipe, plan, world, device, out, overfit_batch)
    demand = Demand()
    with demand.by_signal(), process_group(world, device):
        torch.manual_seed(recipe.seed)
        objective = build_objective(recipe.model, recipe.objective)
        start = find_start(recipe, objective, None if overfit_batch else job.checkpoints, world)
        choose_attention(objective, device, recipe.engine.precision)
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
        state = _resumed(job, engine, start)
        if world.is_main:
            _describe_run(job, describe(world, device, threads))
        log = MetricLog(
            out,
            step=state.progress.step,
            total_steps=plan.resolved.total_steps,
            active=world.is_main,
            tensorboard=recipe.logging.tensorboard,
        )
        for line in (_opening(job, state, start), *start.notes):
            log.say(line)
        writer = _writer(job, engine, log, start)
        parts = _parts(job, engine, state, log, rates, writer, demand)
        try:
            state = train(state, parts, stop_at=_last_step(job, max_steps))
            if writer is not None:
                writer.finish()
        except DataError as error:  # what was given was right when it was looked at
            raise RunError(error.where, error.expected, error.found, error.fix) from error
        finally:
            if writer is not None:
                writer.abandon()
        done = "finished" if state.progress.step == plan.resolved.total_steps else "stopped"
        kept = "" if writer is None else f"; the encoder is in {out / 'encoder'}"
        log.say(f"{done} at step {state.progress.step} of {plan.resolved.total_steps}{kept}")
        log.close()


@dataclass(frozen=True)
class _Job:
    """What stays as it is for as long as this process runs."""

    recipe: Recipe
    plan: Plan
    world: World
    device: torch.device
    out: Path
    overfit_batch: bool

    @property
    def checkpoints(self) -> Path:
        return self.out / "checkpoints"


def _last_step(job: _Job, max_steps: int | None) -> int:
    total_steps = job.plan.resolved.total_steps
    return min(total_steps, max_steps or total_steps)


def _resumed(job: _Job, engine: Engine, start: Start) -> RunState:
    """The state to go on from, its tensors in the engine; how long the run is, is the recipe's to say."""
    if start.checkpoint is None:
        return RunState(Progress(0, job.plan.resolved.total_steps, 0))
    state = load(start.checkpoint, engine)
    return replace(state, progress=replace(state.progress, total_steps=job.plan.resolved.total_steps))


def _writer(job: _Job, engine: Engine, log: MetricLog, start: Start) -> CheckpointWriter | None:
    """A trial on one batch has nothing to keep."""
    recipe = job.recipe

    def export(checkpoint: Path) -> None:
        weights = module_state(checkpoint, "encoder.", verified=True)
        data = recipe.data
        save_encoder(job.out / "encoder", weights, recipe.model, data.mean, data.std, data.views)

    if job.overfit_batch:
        return None
    return CheckpointWriter(
        job.checkpoints,
        engine,
        world=job.world,
        keep_last=recipe.checkpoint.keep_last,
        say=log.say,
        unsound=start.unsound,
        exported=export,
    )


def _parts(
    job: _Job,
    engine: Engine,
    state: RunState,
    log: MetricLog,
    rates: _Rates,
    writer: CheckpointWriter | None,
    demand: Demand,
) -> Parts:
    recipe, resolved = job.recipe, job.plan.resolved

    def prepared(batch: Batch) -> Batch:
        return prepare(batch, job.device, recipe.data.mean, recipe.data.std, job.plan.needs.num_classes)

    def rate(progress: Progress) -> float:
        warmup_steps = resolved.warmup_steps
        return learning_rate(progress, recipe.schedule, peak_lr=resolved.peak_lr, warmup_steps=warmup_steps)

    inline = Inline(recipe, job.plan.val, job.plan.captions, engine, prepared, job.world, job.out)
    return Parts(
        engine=engine,
        steps=_steps(job, state.cursor),
        prepare=prepared,
        learning_rate=rate,
        log=log,
        rates=rates,
        evaluations=inline.periodic(resolved.steps_per_epoch),
        checkpoints=TimedCheckpoints(
            writer,
            world=job.world,
            demand=demand,
            every_steps=recipe.checkpoint.every_steps,
            every_minutes=recipe.checkpoint.every_minutes,
        ),
        limits=Limits(recipe.data.max_bad_samples, recipe.runtime.max_skipped_steps),
        log_every=recipe.logging.every_steps,
    )


def _steps(job: _Job, cursor: int) -> Iterator[StepData]:
    data = job.recipe.data
    loader = TrainLoader(
        job.plan.train,
        job.plan.needs,
        ViewSpec(**data.views.model_dump()),
        augmentations(job.recipe, job.plan.needs),
        mixing(job.recipe, job.plan.needs, job.plan.resolved.micro_size),
        seed=job.recipe.seed,
        lanes=data.lanes,
        window=data.window,
        global_size=job.recipe.batch.global_size,
        micro_size=job.plan.resolved.micro_size,
        rank=job.world.rank,
        world_size=job.world.size,
        num_workers=job.recipe.runtime.num_workers,
        max_pixels=data.max_pixels,
        captions=job.plan.captions,
    )
    if not job.overfit_batch:
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


def _refuse_split_batch_norm(recipe: Recipe, objective: Objective, resolved: Resolved) -> None:
    """Statistics of a micro-batch are not those of the batch: accumulating would train by another algorithm."""
    if resolved.accumulation > 1 and any(
        isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in objective.modules()
    ):
        problem = (
            f"batch.micro_size: expected {resolved.local_size} or nothing, as {recipe.model.name} has batch norm, "
            f"whose statistics do not add up over micro-batches, found {resolved.micro_size}."
        )
        raise RecipeError(recipe.name, [problem])


def _describe_run(job: _Job, environment: str) -> None:
    job.out.mkdir(parents=True, exist_ok=True)
    resolved = f"{resolved_yaml(job.recipe, job.plan.resolved)}data_fingerprint: {job.plan.train.fingerprint}\n"
    _keep_the_shorter(job)
    # The recipe last: it is what makes the folder this run's.
    texts = {"environment.json": environment, "resolved.yaml": resolved, "recipe.yaml": dump(job.recipe)}
    for name, text in texts.items():
        part = job.out / f".{name}.{os.getpid()}"
        part.write_text(text)
        part.replace(job.out / name)


def _keep_the_shorter(job: _Job) -> None:
    """The recipe of a run that now goes on for longer, under another name."""
    given, resolved = job.out / "recipe.yaml", job.out / "resolved.yaml"
    if given.is_file() and resolved.is_file() and is_longer(job.recipe, load_recipe(given)):
        total_steps = read_yaml(resolved.read_text())[0]["resolved"]["total_steps"]
        shutil.copyfile(given, job.out / f"recipe-until-step-{total_steps:08d}.yaml")


def _opening(job: _Job, state: RunState, start: Start) -> str:
    recipe, resolved, world = job.recipe, job.plan.resolved, job.world
    size = f"{resolved.global_size} = {world.size} x {resolved.accumulation} x {resolved.micro_size}"
    return (
        f"{recipe.name}: {recipe.objective.kind} {recipe.model.name}, {job.plan.train.num_samples} samples, "
        f"batch {size}, ZeRO {recipe.engine.zero_stage}, {recipe.engine.precision}, {world.size} x {job.device.type}; "
        f"steps {state.progress.step} to {resolved.total_steps}, {start.source}"
    )
