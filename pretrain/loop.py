"""The step loop and nothing else: data in, steps applied, numbers out, state saved.

Everything it uses is passed in; `run.py` makes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch

from data_pipeline.batch import Batch
from data_pipeline.loader import BadSample, StepData
from pretrain.callbacks.callback import Callback
from pretrain.checkpoints.schedule import CheckpointSchedule
from pretrain.engine.engine import Engine, StepResult
from pretrain.engine.micro_batches import LazyBatches
from pretrain.monitoring.budgets import Budgets
from pretrain.monitoring.clocks import Clocks
from pretrain.monitoring.log import MetricLog, evaluation_line
from pretrain.monitoring.throughput import Throughput
from pretrain.runtime.collectives import mean_over_ranks
from pretrain.runtime.state import Progress, RunState


@dataclass(frozen=True)
class LoopContext:
    """What the loop works with.

    Attributes:
        engine: applies steps.
        steps: this rank's share of step after step, from the state's cursor on.
        prepare: makes the normalized batch on the device out of a host batch.
        learning_rates: that of the schedule, and that of modules which keep the peak after the warmup.
        callbacks: what happens beside the steps: evaluations, the online probe, health checks.
        checkpoints: when and how the state is saved, and whether a stop is requested.
        clocks: one `phase` for the watchdog, the timeline and the times that are logged.
        throughput: samples per second over all ranks -> MFU and memory.
        budgets: how much may go wrong.
        log: takes numbers and sentences, on rank 0.
        log_every: steps between logged ones.
    """

    engine: Engine
    steps: Iterator[StepData]
    prepare: Callable[[Batch], Batch]
    learning_rates: Callable[[Progress], tuple[float, float]]
    callbacks: tuple[Callback, ...]
    checkpoints: CheckpointSchedule
    clocks: Clocks
    throughput: Throughput
    budgets: Budgets
    log: MetricLog
    log_every: int


def train(state: RunState, context: LoopContext, stop_at: int) -> RunState:
    """Applies steps until `stop_at` of them are applied, counted from the start of the run; saves the last state.

    Where a stop is requested, it returns before, with its state saved.

    Raises:
        RunError: a budget is used up; the message names the samples.
    """
    phase, bad_samples = context.clocks.phase, list[BadSample]()
    while state.progress.step < stop_at and not context.checkpoints.stopping:
        with phase("data", state.progress.step):
            data = next(context.steps)
        with phase("step", state.progress.step):
            batches = LazyBatches(data.micro_batches, partial(_load, context))
            result = context.engine.step(batches, state.progress, *context.learning_rates(state.progress))
        context.clocks.add(data.cursor - state.cursor, data.seconds)
        bad_samples += data.bad
        state = _advance(state, data, result)
        if not result.applied:
            keys = [key for batch in data.micro_batches for key in batch.keys]
            loss_is_finite = bool(torch.isfinite(result.metrics["loss"]))
            context.budgets.count_skipped_step(state.progress.step + 1, state.skipped_steps, loss_is_finite, keys)
            continue
        step, last = state.progress.step, state.progress.step == stop_at
        for callback in context.callbacks:
            result = replace(result, metrics={**result.metrics, **callback.after_step(state, data.micro_batches)})
        logged = last or step % context.log_every == 0
        save = context.checkpoints.due(step) or last
        if logged or save:
            state = replace(state, bad_samples=context.budgets.count_bad_samples(state.bad_samples, bad_samples))
            bad_samples = []
        if logged:
            _log_step(state, result, context)
        if context.checkpoints.stopping:
            _save(state, context)  # there may be no time for more
        for callback in context.callbacks:
            if callback.is_due(step, last):
                _evaluate(callback, state, context)
        if save and not context.checkpoints.stopping:
            _save(state, context)
        if logged or save:
            context.clocks.restart()
    return state


def _advance(state: RunState, data: StepData, result: StepResult) -> RunState:
    """A skipped step reads and does not learn: the cursor goes on, the progress does not."""
    if not result.applied:
        return replace(state, cursor=data.cursor, skipped_steps=state.skipped_steps + 1)
    return replace(state, cursor=data.cursor, progress=state.progress.advance(data.cursor - state.cursor))


def _load(context: LoopContext, batch: Batch) -> Batch:
    """A micro-batch on the device, when its turn comes."""
    with context.engine.clock.part("copy"):
        batch = context.prepare(batch)
        for callback in context.callbacks:
            callback.on_batch(batch)
    return batch


def _save(state: RunState, context: LoopContext) -> None:
    with context.clocks.phase("checkpoint", state.progress.step):
        context.checkpoints.save(state)


def _evaluate(callback: Callback, state: RunState, context: LoopContext) -> None:
    step = state.progress.step
    with context.clocks.phase("evaluation", step):
        values = callback.evaluate(state)
    if values:
        context.log.write(step, values)
        context.log.say(evaluation_line(step, values))


def _log_step(state: RunState, result: StepResult, context: LoopContext) -> None:
    clocks = context.clocks
    means = mean_over_ranks({**result.metrics, **clocks.shares(), **clocks.take_time_shares()})
    images_per_second = clocks.images_per_second
    values = {
        **means,
        **result.rates,
        "grad_norm": result.grad_norm,
        "images_per_second": images_per_second,
        **context.throughput(images_per_second),
        "samples_seen": float(state.progress.samples_seen),
        "skipped_steps": float(state.skipped_steps),
        "bad_samples": float(state.bad_samples),
    }
    context.log.write(state.progress.step, values)
    context.log.progress(state.progress.step, values)
    for callback in context.callbacks:
        callback.on_log(values)
