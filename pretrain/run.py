"""START HERE: from a recipe to the objects that train it, and into the loop.

`run` is what every rank calls. Wrong input it answers before anything is started or written: preflight.py.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path

import torch

from data_pipeline.batch import Batch
from data_pipeline.errors import InputError, RunError
from data_pipeline.loader import StepData, TrainLoader
from pretrain.announce import closing_line, opening
from pretrain.augment.augment import augmentations, mixing, prepare
from pretrain.callbacks.callback import Callback
from pretrain.callbacks.evaluations import ProtocolEvaluation, Validation, ValidationData, steps_between
from pretrain.callbacks.health import HealthChecks, UndrawnCrops, usual_checks
from pretrain.callbacks.online_probe import OnlineProbe, ProbeTraining
from pretrain.callbacks.pictures import Pictures
from pretrain.callbacks.profiler import profiled
from pretrain.checkpoints.export import export_encoder
from pretrain.checkpoints.schedule import CheckpointSchedule, check_time_to_save
from pretrain.checkpoints.start import Start, find_start, resume
from pretrain.checkpoints.writer import CheckpointWriter
from pretrain.engine.attention import choose_attention
from pretrain.engine.engine import Engine
from pretrain.engine.precision import settle_precision
from pretrain.evals.protocols import inline_evaluators
from pretrain.evals.sources.trained import TrainedRun
from pretrain.loop import LoopContext, train
from pretrain.monitoring.budgets import FILE_NAME as SKIPPED
from pretrain.monitoring.budgets import Budgets
from pretrain.monitoring.clocks import Clocks
from pretrain.monitoring.goodput import read_goodput
from pretrain.monitoring.log import MetricLog
from pretrain.monitoring.sinks import open_sinks
from pretrain.monitoring.throughput import Throughput, flops_per_sample
from pretrain.monitoring.timeline import Timeline
from pretrain.monitoring.watchdog import Watchdog
from pretrain.objectives.contract import Objective
from pretrain.objectives.kinds import build_objective
from pretrain.optim.schedules import learning_rates
from pretrain.plan import checkpoint_bytes
from pretrain.preflight import Plan, preflight
from pretrain.recipe.recipe import Recipe
from pretrain.record import changed_settings, claimed, record_run, refuse_other_run
from pretrain.runtime.collectives import World, gather_objects, process_group
from pretrain.runtime.environment import choose_device, describe, pin_threads
from pretrain.runtime.signals import SignalRequests
from pretrain.runtime.state import RunState


@dataclass(frozen=True)
class RunContext:
    """What stays as it is for as long as this process runs."""

    recipe: Recipe
    plan: Plan
    world: World
    device: torch.device
    out: Path
    max_steps: int | None
    overfit_batch: bool
    profile_steps: int | None
    evals_apart: bool
    requests: SignalRequests
    watchdog: Watchdog

    def prepare(self, batch: Batch) -> Batch:
        """Makes the normalized batch on the device out of a host batch."""
        self.watchdog.alive()  # a long validation is no hang
        data = self.recipe.data
        return prepare(batch, self.device, data.mean, data.std, self.plan.needs.num_classes)


def output_folder(out: Path, overfit_batch: bool) -> Path:
    """The folder of a run: a trial on one batch is kept beside the run that it is a trial of."""
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
        overfit_batch: train on the first batch only, from scratch, in `output_folder(out, True)`.
        profile_steps: so many steps are traced to `profile/` in the run's folder, after two that warm up.
        evals_apart: other jobs judge the checkpoints, by the recipe's `evals`.

    Returns:
        Whether it got as far as it was to; False: a stop was requested before (Ctrl-C, SIGTERM), its state is saved.

    Raises:
        InputError: something given is wrong; nothing was changed.
        RunError: the run failed.
    """
    world = World.from_environment()
    device = choose_device(recipe.runtime.device, world)
    threads = pin_threads(recipe.runtime.threads, world)
    out = output_folder(out, overfit_batch)
    if overfit_batch:
        recipe = recipe.model_copy(update={"resume_from": None})
    plan = preflight(recipe, world.size, out, evals_apart=evals_apart)
    requests, timeout = SignalRequests(world.is_main), recipe.runtime.step_timeout_seconds
    group = process_group(world, device, seconds=max(1800, 2 * (timeout or 0)))  # after the watchdog, which says more
    check = partial(refuse_other_run, recipe, plan.data, plan.resolved.total_steps, out)
    with requests.listening(), group, Watchdog(world, timeout, out) as watchdog, claimed(out, world, check):
        torch.manual_seed(recipe.seed)
        objective = build_objective(recipe.model, recipe.objective)
        settled = settle_precision(recipe.engine, recipe.resume_from, objective, device, out)
        recipe = recipe.model_copy(update={"engine": settled})
        context = RunContext(
            recipe, plan, world, device, out, max_steps, overfit_batch, profile_steps, evals_apart, requests, watchdog
        )
        checkpoints = None if overfit_batch else out / "checkpoints"
        start = find_start(objective, checkpoints, world, **recipe.start_from)
        if start.checkpoint is None and checkpoints is not None:
            check_time_to_save(checkpoint_bytes(plan.objective, recipe.optim, recipe.ema, plan.probe_bytes), out, world)
        engine, throughput = _engine(context, objective)
        probe = OnlineProbe(recipe.online_probe, plan.probe, engine) if recipe.online_probe and plan.probe else None
        if start.checkpoint is not None and not start.own:
            start = replace(start, notes=changed_settings(recipe, start.checkpoint.path))
        state, start = resume(start, engine.state, probe.fragments() if probe else (), plan.resolved.total_steps)
        hosts = gather_objects(platform.node())
        if world.is_main:
            record_run(out, recipe, plan.resolved, plan.data, describe(world, device, threads, hosts))
        try:
            return _train(context, engine, throughput, probe, start, state)
        except InputError as error:  # what was given was right when it was looked at
            raise RunError(error.where, error.expected, error.found, error.fix) from error


def _engine(context: RunContext, objective: Objective) -> tuple[Engine, Throughput]:
    """What trains, and what its speed is measured against; both before the first step."""
    recipe, resolved = context.recipe, context.plan.resolved
    choose_attention(objective, context.device, recipe.engine.settled_precision, recipe.engine.sdpa)
    flops = flops_per_sample(objective)  # while the weights are whole
    engine = Engine(
        objective, recipe.optim, recipe.engine, world=context.world, device=context.device,
        micro_size=resolved.micro_size, accumulation=resolved.accumulation, seed=recipe.seed, ema=recipe.ema,
    )  # fmt: skip
    peak_tflops = recipe.runtime.peak_tflops
    return engine, Throughput(flops, context.device, context.world.size, recipe.engine.settled_precision, peak_tflops)


def _train(
    context: RunContext,
    engine: Engine,
    throughput: Throughput,
    probe: OnlineProbe | None,
    start: Start,
    state: RunState,
) -> bool:
    """The loop, with all that it needs, and the last checkpoint on disk. Returns whether it got as far as it was to."""
    recipe, world, out, total_steps = context.recipe, context.world, context.out, state.progress.total_steps
    stop_at, first_step = min(total_steps, context.max_steps or total_steps), state.progress.step
    peak_lr, warmup = context.plan.resolved.peak_lr, context.plan.resolved.warmup_steps
    export = partial(export_encoder, recipe.model, recipe.objective, recipe.data, folder=out / "encoder")
    sinks = open_sinks(recipe.logging, out, recipe.name, first_step) if world.is_main else {}
    log = MetricLog(out, step=first_step, total_steps=total_steps, active=world.is_main, sinks=sinks)
    with closing(log):
        what = f"{recipe.name}: {recipe.objective.kind} {recipe.model.name}"
        first_line = opening(what, recipe.engine, context.plan, world, context.device, first_step, start)
        for line in (first_line, *context.plan.notes, *start.notes):
            log.say(line)
        writer = CheckpointWriter(
            out / "checkpoints", engine.state, world=world, keep_last=recipe.checkpoint.keep_last, say=log.say,
            unsound=start.unsound, exported=export, auxiliary=probe.fragments() if probe else (),
        )  # fmt: skip
        checkpoints = CheckpointSchedule(
            None if context.overfit_batch else writer, world=world, requests=context.requests,
            every_steps=recipe.checkpoint.every_steps, every_minutes=recipe.checkpoint.every_minutes,
        )  # fmt: skip
        timeline = Timeline(out, step=first_step, active=world.is_main)
        traces = profiled(context.profile_steps, out / "profile" / f"rank{world.rank}.json.gz", log)
        with timeline, writer, traces as profilers:
            loop = LoopContext(
                engine=engine,
                steps=_steps(context, state.cursor),
                prepare=context.prepare,
                learning_rates=partial(learning_rates, schedule=recipe.schedule, peak_lr=peak_lr, warmup_steps=warmup),
                callbacks=(*_callbacks(context, engine, probe, log), *profilers),
                checkpoints=checkpoints,
                clocks=Clocks(engine.clock, (context.watchdog.progress, timeline.mark)),
                throughput=throughput,
                budgets=Budgets(
                    recipe.data.max_bad_samples, recipe.runtime.max_skipped_steps, log.say, log.append, out / SKIPPED
                ),
                log=log,
                log_every=recipe.logging.every_steps,
            )
            state = train(state, loop, stop_at)
            writer.finish()
            if state.progress.step == first_step and start.checkpoint is not None and world.is_main:
                export(start.checkpoint.path)  # the process before may have died between a checkpoint and its export
            timeline.end(finished=True, done=state.progress.step >= stop_at)
            if world.is_main and (goodput := read_goodput(out)) is not None:
                log.say(str(goodput))
            log.say(closing_line(out, state.progress))
    return state.progress.step >= stop_at


def _callbacks(context: RunContext, engine: Engine, probe: OnlineProbe | None, log: MetricLog) -> Iterator[Callback]:
    """What happens beside the steps, in its order."""
    recipe, plan, data, epoch = context.recipe, context.plan, context.recipe.data, context.plan.resolved.steps_per_epoch
    if probe is not None:
        yield ProbeTraining(probe, context.prepare)
    yield UndrawnCrops()
    yield HealthChecks(usual_checks(recipe.runtime.num_workers, context.world.local_size), log.say)
    if plan.val is not None:
        every = steps_between(recipe.validation.every_epochs, epoch)
        val = ValidationData(plan.val, data, recipe.model.judged_size, recipe.batch.micro_size, plan.captions)
        yield Validation(every, val, engine, context.prepare, probe, log.say)

    trained = TrainedRun(context.out, recipe.name, recipe.seed, recipe.model, recipe.objective, data)
    evaluators = () if context.evals_apart else inline_evaluators(recipe.evals, data.cache, data.max_bad_samples)
    for i, (config, evaluator) in enumerate(zip(recipe.evals, evaluators, strict=not context.evals_apart)):
        every = steps_between(config.every_epochs, epoch)
        yield ProtocolEvaluation(every, i, config, evaluator, engine, trained, context.watchdog.alive, log)
    if (every_steps := recipe.logging.images_every_steps) is not None:
        rebuild = partial(build_objective, recipe.model, recipe.objective)
        yield Pictures(every_steps, engine, rebuild, data.mean, data.std, log, context.out)


def _steps(context: RunContext, cursor: int) -> Iterator[StepData]:
    """This rank's share of step after step; of a trial on one batch, the first again and again."""
    recipe, data, plan, world = context.recipe, context.recipe.data, context.plan, context.world
    loader = TrainLoader(
        plan.train, plan.needs, data.views, augmentations(recipe, plan.needs),
        mixing(recipe, plan.needs, plan.resolved.micro_size), seed=recipe.seed, read_streams=data.read_streams,
        shuffle_window=data.shuffle_window, repeats=data.repeats, global_size=recipe.batch.global_size,
        micro_size=plan.resolved.micro_size, rank=world.rank, world_size=world.size, captions=plan.captions,
        num_workers=recipe.runtime.num_workers, max_pixels=data.max_pixels,
    )  # fmt: skip
    if not context.overfit_batch:
        return loader.steps(cursor)
    first = next(loader.steps(0))
    again = replace(first, bad=(), seconds=dict.fromkeys(first.seconds, 0.0))
    return (replace(again if step > 1 else first, cursor=first.cursor * step) for step in count(1))
