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
from data_pipeline.captions import Captions
from data_pipeline.errors import DataError, RecipeError, RunError
from data_pipeline.loader import StepData, TrainLoader
from data_pipeline.mixture import open_training
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
from pretrain.models.attention import choose_attention
from pretrain.models.encoders import save_encoder
from pretrain.models.tokenizers import build_tokenizer
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
    captions: Captions | None
    resolved: Resolved


def preflight(recipe: Recipe, world_size: int, out: Path) -> Plan:
    """Checks the recipe against its data, the number of ranks and the run's folder; writes nothing.

    Raises:
        InputError: of whichever is wrong.
    """
    train_data = open_training(recipe.data.train)
    resolved = resolve(recipe, world_size, train_data.num_samples)
    with torch.device("meta"):  # the shapes alone
        objective = build_objective(recipe.model, recipe.objective)
    needs = objective.needs
    _refuse_split_batch_norm(recipe, objective, resolved)
    captions = _captions(recipe, needs)
    check(train_data, needs, captions)
    val = open_dataset(recipe.data.val) if recipe.data.val else None
    if val is not None:
        check(val, needs, captions)
    knn_evaluators(recipe)
    _refuse_other_run(recipe, train_data, out)
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
    with process_group(world, device):
        torch.manual_seed(recipe.seed)
        objective = build_objective(recipe.model, recipe.objective)
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
        state, source = _first_state(job, engine)
        if world.is_main:
            _describe_run(job, describe(world, device, threads))
        log = MetricLog(
            out,
            step=state.progress.step,
            total_steps=plan.resolved.total_steps,
            active=world.is_main,
            tensorboard=recipe.logging.tensorboard,
        )
        log.say(_opening(job, state, source))
        try:
            state = train(state, _parts(job, engine, state, log, rates), stop_at=_last_step(job, max_steps))
        except DataError as error:  # what was given was right when it was looked at
            raise RunError(error.where, error.expected, error.found, error.fix) from error
        done = "finished" if state.progress.step == plan.resolved.total_steps else "stopped"
        log.say(
            f"{done} at step {state.progress.step} of {plan.resolved.total_steps}; the encoder is in {out / 'encoder'}"
        )
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


def _first_state(job: _Job, engine: Engine) -> tuple[RunState, Path | None]:
    """Of the run's own latest complete checkpoint, loaded into the engine, or of a new run."""
    found = [] if job.overfit_batch else checkpoint.complete_checkpoints(job.checkpoints)
    barrier()  # all have looked before anyone writes
    if found:
        return checkpoint.load(found[-1], engine, world=job.world), found[-1]
    return RunState(Progress(0, job.plan.resolved.total_steps, 0)), None


def _parts(job: _Job, engine: Engine, state: RunState, log: MetricLog, rates: _Rates) -> Parts:
    recipe, resolved = job.recipe, job.plan.resolved

    def prepare(batch: Batch) -> Batch:
        return normalize(batch.to(job.device), recipe.data.mean, recipe.data.std)

    def rate(progress: Progress) -> float:
        warmup_steps = resolved.warmup_steps
        return learning_rate(progress, recipe.schedule, peak_lr=resolved.peak_lr, warmup_steps=warmup_steps)

    def save(state: RunState) -> None:
        weights = engine.materialize(engine.objective.encoder)
        if job.world.is_main:
            data = recipe.data
            save_encoder(job.out / "encoder", weights, recipe.model, data.mean, data.std, data.views)
        if not job.overfit_batch:
            keep_last = recipe.checkpoint.keep_last
            saved = checkpoint.save(job.checkpoints, engine, state, world=job.world, keep_last=keep_last)
            log.say(f"saved {saved}")

    inline = Inline(recipe, job.plan.val, job.plan.captions, engine, prepare, job.world, job.out)
    return Parts(
        engine=engine,
        steps=_steps(job, state.cursor),
        prepare=prepare,
        learning_rate=rate,
        log=log,
        rates=rates,
        evaluations=inline.periodic(resolved.steps_per_epoch),
        checkpoints=TimedCheckpoints(
            save,
            every_steps=recipe.checkpoint.every_steps,
            every_minutes=recipe.checkpoint.every_minutes,
            log_every=recipe.logging.every_steps,
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


def _describe_run(job: _Job, environment: str) -> None:
    job.out.mkdir(parents=True, exist_ok=True)
    resolved = f"{resolved_yaml(job.recipe, job.plan.resolved)}data_fingerprint: {job.plan.train.fingerprint}\n"
    # The recipe last: it is what makes the folder this run's.
    texts = {"environment.json": environment, "resolved.yaml": resolved, "recipe.yaml": dump(job.recipe)}
    for name, text in texts.items():
        part = job.out / f".{name}.{os.getpid()}"
        part.write_text(text)
        part.replace(job.out / name)


def _opening(job: _Job, state: RunState, source: Path | None) -> str:
    recipe, resolved, world = job.recipe, job.plan.resolved, job.world
    size = f"{resolved.global_size} = {world.size} x {resolved.accumulation} x {resolved.micro_size}"
    return (
        f"{recipe.name}: {recipe.objective.kind} {recipe.model.name}, {job.plan.train.num_samples} samples, "
        f"batch {size}, ZeRO {recipe.engine.zero_stage}, {recipe.engine.precision}, {world.size} x {job.device.type}; "
        f"steps {state.progress.step} to {resolved.total_steps}, {f'from {source}' if source else 'from scratch'}"
    )
