"""START HERE: from a recipe to the objects that train it, and into the loop.

`run` is what every rank calls. Wrong input it answers before anything is started or written: preflight.py.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch

from data_pipeline.batch import Batch
from data_pipeline.errors import InputError, RecipeError, RunError
from data_pipeline.loader import StepData, TrainLoader
from data_pipeline.samples.views import ViewSpec
from pretrain.augment.augment import augmentations, mixing, prepare
from pretrain.callbacks.evaluations import Inline
from pretrain.callbacks.online_probe import OnlineProbe
from pretrain.callbacks.pictures import Pictures
from pretrain.checkpoints.checkpoint import BESIDE, load, load_beside
from pretrain.checkpoints.export import export_encoder
from pretrain.checkpoints.schedule import TimedCheckpoints, check_time_to_save
from pretrain.checkpoints.start import Start, find_start, not_longer
from pretrain.checkpoints.writer import CheckpointWriter
from pretrain.engine.engine import Engine
from pretrain.loop import Limits, Parts, Periodic, train
from pretrain.models.attention import choose_attention
from pretrain.monitoring.advice import Lasting, collapse
from pretrain.monitoring.goodput import Timeline, read_goodput
from pretrain.monitoring.metrics import MetricLog, Rates, flops_per_sample
from pretrain.monitoring.sinks import open_sinks
from pretrain.monitoring.timing import DataBrake, profiled
from pretrain.monitoring.watchdog import Watchdog
from pretrain.objectives.contract import Objective
from pretrain.objectives.kinds import build_objective
from pretrain.optim.schedules import learning_rate, undecayed_rate
from pretrain.plan import checkpoint_bytes
from pretrain.preflight import Plan, preflight
from pretrain.recipe.recipe import Recipe
from pretrain.record import claim, record_run
from pretrain.runtime.collectives import World, gather_objects, process_group
from pretrain.runtime.environment import choose_device, describe, pin_threads
from pretrain.runtime.signals import Demand
from pretrain.runtime.state import Progress, RunState


def folder_of(out: Path, overfit_batch: bool) -> Path:
    """Where a run is kept: a trial on one batch lies beside the run that it is a trial of."""
    return out.with_name(f"{out.name}-overfit") if overfit_batch else out


def run(
    recipe: Recipe,
    out: Path,
    *,
    max_steps: int | None = None,
    overfit_batch: bool = False,
    profile_steps: int | None = None,
    evals_apart: bool = False,
) -> bool:
    """Trains, or goes on with the run in `out`; every rank calls it with the same arguments.

    Args:
        recipe: of the run.
        out: the run's folder.
        max_steps: stop after so many applied steps; started again without it, the run goes on.
        overfit_batch: train on the first batch only, from scratch, in `folder_of(out, True)`.
        profile_steps: so many steps are traced to `profile/` in the run's folder, after two that warm up.
        evals_apart: others judge the checkpoints, by the recipe's `evals`.

    Returns:
        Whether it got as far as it was to; False: it was asked to stop before (SIGUSR2), and its state is saved.

    Raises:
        InputError: something given is wrong; nothing was changed.
        RunError: the run failed.
    """
    world = World.from_environment()
    device = choose_device(recipe.runtime, world)
    threads = pin_threads(recipe.runtime, world)
    out = folder_of(out, overfit_batch)
    if overfit_batch:
        recipe = recipe.model_copy(update={"resume_from": None})
    plan = preflight(recipe, world.size, out)
    job = _Job(recipe, plan, world, device, out, overfit_batch, evals_apart)
    demand = Demand()
    timeout = recipe.runtime.step_timeout_seconds
    group = process_group(world, device, seconds=max(1800, 2 * (timeout or 0)))  # after the watchdog, which says more
    with demand.by_signal(), group, Watchdog(world, timeout, out) as watchdog:
        torch.manual_seed(recipe.seed)
        objective = build_objective(recipe.model, recipe.objective)
        start = find_start(recipe, objective, None if overfit_batch else job.checkpoints, world)
        if start.checkpoint is None and not overfit_batch:
            check_time_to_save(checkpoint_bytes(objective, recipe, plan.probe), out, world)
        engine, rates = _engine(job, objective)
        probe = _probe(job, engine)
        state, notes = _resumed(job, engine, probe, start)
        lock = claim(out, world)
        hosts = gather_objects(platform.node())
        if world.is_main:
            record_run(out, recipe, plan, describe(world, device, threads, hosts))
        log = MetricLog(
            out,
            step=state.progress.step,
            total_steps=plan.resolved.total_steps,
            active=world.is_main,
            sinks=open_sinks(recipe.logging, out, recipe.name, state.progress.step) if world.is_main else (),
        )
        for line in (_opening(job, state, start), *start.notes, *notes):
            log.say(line)
        writer = _writer(job, engine, probe, log, start)
        parts = _parts(job, engine, probe, state, log, rates, writer, demand, watchdog.alive)
        timeline = Timeline(out, step=state.progress.step, active=world.is_main)
        try:
            with profiled(profile_steps, out / "profile" / f"rank{world.rank}.json.gz") as after_step:
                parts = replace(parts, after_step=after_step, watch=partial(_watch, watchdog, timeline))
                return _train(job, state, parts, max_steps, writer, start, timeline)
        except InputError as error:  # what was given was right when it was looked at
            raise RunError(error.where, error.expected, error.found, error.fix) from error
        finally:
            if writer is not None:
                writer.abandon()
            timeline.end(finished=False)
            log.close()
            if lock is not None:
                lock.close()


@dataclass(frozen=True)
class _Job:
    """What stays as it is for as long as this process runs."""

    recipe: Recipe
    plan: Plan
    world: World
    device: torch.device
    out: Path
    overfit_batch: bool
    evals_apart: bool

    @property
    def checkpoints(self) -> Path:
        return self.out / "checkpoints"


def _engine(job: _Job, objective: Objective) -> tuple[Engine, Rates]:
    """What trains, and what its speed is measured against; both before the first step."""
    recipe, resolved = job.recipe, job.plan.resolved
    choose_attention(objective, job.device, recipe.engine.precision, recipe.engine.sdpa)
    flops = flops_per_sample(objective)  # while the weights are whole
    engine = Engine(
        objective,
        recipe.optim,
        recipe.engine,
        world=job.world,
        device=job.device,
        micro_size=resolved.micro_size,
        accumulation=resolved.accumulation,
        seed=recipe.seed,
        ema=recipe.ema,
    )
    return engine, Rates(recipe, flops, job.device, job.world)


def _train(
    job: _Job,
    state: RunState,
    parts: Parts,
    max_steps: int | None,
    writer: CheckpointWriter | None,
    start: Start,
    timeline: Timeline,
) -> bool:
    """The loop, and the last checkpoint on disk. Returns whether it got as far as it was to."""
    first_step, total_steps = state.progress.step, job.plan.resolved.total_steps
    stop_at = min(total_steps, max_steps or total_steps)
    state = train(state, parts, stop_at)
    if writer is not None:
        writer.finish()
    if state.progress.step == first_step and start.checkpoint is not None and job.world.is_main:
        # The process before may have died between a checkpoint and its export.
        export_encoder(job.recipe, start.checkpoint.path, job.out / "encoder")
    timeline.end(finished=True)
    if job.world.is_main and (goodput := read_goodput(job.out)) is not None:
        parts.log.say(str(goodput))
    parts.log.say(_closing(job, state))
    return state.progress.step >= stop_at


def _watch(watchdog: Watchdog, timeline: Timeline, step: int, begins: str) -> None:
    watchdog.progress(step, begins)
    timeline.mark(step, begins)


def _probe(job: _Job, engine: Engine) -> OnlineProbe | None:
    if job.plan.probe is None:
        return None
    assert job.recipe.online_probe is not None  # of which the plan made the shape
    return OnlineProbe(job.recipe.online_probe, job.plan.probe, engine)


def _train_probe(
    probe: OnlineProbe, prepared: Callable[[Batch], Batch], batches: Sequence[Batch], step: int
) -> dict[str, torch.Tensor]:
    """On batches of the host, of which no more is brought to the device than a probe looks at."""
    looked_at = (replace(batch, views=batch.views[:1], masks=None, tokens=None) for batch in batches)
    return probe.train(map(prepared, looked_at), step)


def _resumed(job: _Job, engine: Engine, probe: OnlineProbe | None, start: Start) -> tuple[RunState, tuple[str, ...]]:
    """The state to go on from, its tensors in the engine, and notes; how long the run is, is the recipe's to say."""
    if start.checkpoint is None:
        return RunState(Progress(0, job.plan.resolved.total_steps, 0)), ()
    state = load(start.checkpoint, engine.state)
    notes: tuple[str, ...] = ()
    had_probe = any(name.startswith(BESIDE) for name in start.checkpoint.tensors.shapes)
    if probe is not None and not load_beside(start.checkpoint, probe.fragments()):
        notes = (f"the online probe starts anew: the checkpoint has {'another' if had_probe else 'none'}",)
    if probe is None and had_probe:
        notes = ("the checkpoint's online probe is left behind",)
    start.checkpoint.close()  # or its files would be held, removed or not, for as long as the run goes on
    own = start.checkpoint.path.parent == job.checkpoints
    if own and (problems := not_longer(job.plan.resolved.total_steps, state.progress)):
        raise RecipeError(f"{job.out} holds another run", problems)  # its last checkpoint was passed over
    return replace(state, progress=replace(state.progress, total_steps=job.plan.resolved.total_steps)), notes


def _writer(
    job: _Job, engine: Engine, probe: OnlineProbe | None, log: MetricLog, start: Start
) -> CheckpointWriter | None:
    """A trial on one batch has nothing to keep."""
    recipe = job.recipe

    if job.overfit_batch:
        return None
    return CheckpointWriter(
        job.checkpoints,
        engine.state,
        world=job.world,
        keep_last=recipe.checkpoint.keep_last,
        say=log.say,
        unsound=start.unsound,
        exported=partial(export_encoder, recipe, folder=job.out / "encoder"),
        beside=() if probe is None else probe.fragments(),
    )


def _parts(
    job: _Job,
    engine: Engine,
    probe: OnlineProbe | None,
    state: RunState,
    log: MetricLog,
    rates: Rates,
    writer: CheckpointWriter | None,
    demand: Demand,
    alive: Callable[[], None],
) -> Parts:
    recipe, resolved = job.recipe, job.plan.resolved

    def prepared(batch: Batch) -> Batch:
        alive()  # a long validation is no hang
        return prepare(batch, job.device, recipe.data.mean, recipe.data.std, job.plan.needs.num_classes)

    peak: dict[str, Any] = {"peak_lr": resolved.peak_lr, "warmup_steps": resolved.warmup_steps}

    inline = Inline(recipe, job.plan.val, job.plan.captions, engine, prepared, job.world, job.out, alive, probe)
    evaluations = inline.periodic(resolved.steps_per_epoch, judge=not job.evals_apart)
    see: Callable[[Batch], Batch] = lambda batch: batch  # noqa: E731
    if recipe.logging.images_every_steps is not None:
        pictures = Pictures(recipe, engine, log, job.world, job.out)
        evaluations = (*evaluations, Periodic(recipe.logging.images_every_steps, pictures.paint))
        see = pictures.see
    return Parts(
        engine=engine,
        steps=_steps(job, state.cursor),
        prepare=lambda batch: see(prepared(batch)),
        learning_rate=partial(learning_rate, schedule=recipe.schedule, **peak),
        undecayed_rate=partial(undecayed_rate, **peak),
        log=log,
        rates=rates,
        evaluations=evaluations,
        checkpoints=TimedCheckpoints(
            writer,
            world=job.world,
            demand=demand,
            every_steps=recipe.checkpoint.every_steps,
            every_minutes=recipe.checkpoint.every_minutes,
        ),
        limits=Limits(recipe.data.max_bad_samples, recipe.runtime.max_skipped_steps),
        log_every=recipe.logging.every_steps,
        advise=(DataBrake(recipe.runtime.num_workers, _idle_cores(job)), Lasting(collapse)),
        probe=None if probe is None else partial(_train_probe, probe, prepared),
    )


def _idle_cores(job: _Job) -> int:
    """For each rank of this machine, beside its own threads and workers."""
    cores = len(os.sched_getaffinity(0)) // job.world.local_size
    return max(0, cores - torch.get_num_threads() - job.recipe.runtime.num_workers)


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
        repeats=data.repeats,
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
    again = replace(first, bad=(), seconds=dict.fromkeys(first.seconds, 0.0))
    return (replace(again if step > 1 else first, cursor=first.cursor * step) for step in count(1))


def _closing(job: _Job, state: RunState) -> str:
    step, total_steps = state.progress.step, state.progress.total_steps
    encoder = job.out / "encoder"
    where = f"; the encoder is in {encoder}" if encoder.is_dir() else ""
    return f"{'finished' if step == total_steps else 'stopped'} at step {step} of {total_steps}{where}"


def _opening(job: _Job, state: RunState, start: Start) -> str:
    recipe, resolved, world = job.recipe, job.plan.resolved, job.world
    size = f"{resolved.global_size} = {world.size} x {resolved.accumulation} x {resolved.micro_size}"
    return (
        f"{recipe.name}: {recipe.objective.kind} {recipe.model.name}, {job.plan.train.num_samples} samples, "
        f"batch {size}, ZeRO {recipe.engine.zero_stage}, {recipe.engine.precision}, {world.size} x {job.device.type}; "
        f"steps {state.progress.step} to {resolved.total_steps}, {start.source}"
    )
