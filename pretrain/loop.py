"""The step loop and nothing else: data in, steps applied, numbers out, state saved.

Everything it uses is passed in; `run.py` makes it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, overload

import torch

from data_pipeline.batch import Batch
from data_pipeline.errors import RunError
from data_pipeline.loader import BadSample, StepData
from pretrain.engine.engine import Engine, StepResult
from pretrain.monitoring.advice import Advise
from pretrain.monitoring.metrics import MetricLog
from pretrain.monitoring.timing import PARTS, Stopwatch
from pretrain.runtime.collectives import gather_objects, mean_over_ranks
from pretrain.runtime.state import Progress, RunState


@dataclass(frozen=True)
class Periodic:
    """An evaluation at every `every_steps`-th step and at the last one; all ranks call it."""

    every_steps: int
    evaluate: Callable[[RunState], dict[str, float]]


class Checkpoints(Protocol):
    """When to save, and the saving; all ranks call both. `stopping` holds from `due` on where a stop is asked for."""

    stopping: bool

    def due(self, step: int) -> bool: ...
    def save(self, state: RunState) -> None: ...


@dataclass(frozen=True)
class Limits:
    """How much may go wrong before the run stops."""

    bad_samples: int
    skipped_steps: int


@dataclass(frozen=True)
class Parts:
    """What the loop works with.

    Attributes:
        engine: applies steps.
        steps: this rank's share of step after step, from the state's cursor on.
        prepare: a host batch -> the normalised batch on the device.
        learning_rate: pure function of the progress.
        undecayed_rate: likewise, of modules whose learning rate does not decay.
        log: numbers and words, on rank 0.
        rates: (samples per second over all ranks) -> further numbers, such as MFU and memory.
        evaluations: what is judged on the way.
        checkpoints: when and how the state is saved.
        limits: budgets.
        log_every: steps between logged ones.
        advise: what looks at the values of each logged step, and says so where something is wrong.
        probe: trained on the host batches of every applied step, counted, beside the objective; gives metrics of it.
        after_step: called after every applied step; a profiler's.
        watch: told the steps applied and what begins now (data, step, evaluation, checkpoint); all ranks alike.
    """

    engine: Engine
    steps: Iterator[StepData]
    prepare: Callable[[Batch], Batch]
    learning_rate: Callable[[Progress], float]
    undecayed_rate: Callable[[Progress], float]
    log: MetricLog
    rates: Callable[[float], dict[str, float]]
    evaluations: tuple[Periodic, ...]
    checkpoints: Checkpoints
    limits: Limits
    log_every: int
    advise: tuple[Advise, ...] = ()
    probe: Callable[[Sequence[Batch], int], dict[str, torch.Tensor]] | None = None
    after_step: Callable[[], None] = lambda: None
    watch: Callable[[int, str], None] = lambda step, begins: None


def train(state: RunState, parts: Parts, stop_at: int) -> RunState:
    """Applies steps until `stop_at` of them are applied, counted from the start of the run; saves the last state.

    Asked to stop (`Checkpoints.stopping`), it returns before, with its state saved.

    Raises:
        RunError: a budget is used up; the message names the samples.
    """
    meter = _Meter()
    parts.engine.clock.take()  # what was booked while everything was made
    while state.progress.step < stop_at:
        parts.watch(state.progress.step, "data")
        with meter.waiting():
            data = next(parts.steps)
        parts.watch(state.progress.step, "step")
        lr = parts.learning_rate(state.progress)
        batches = _Prepared(data.micro_batches, parts.prepare, parts.engine.clock)
        result = parts.engine.step(batches, state.progress, lr, parts.undecayed_rate(state.progress))
        meter.add(data, num_samples=data.cursor - state.cursor)
        state = _advance(state, data, result)
        if not result.applied:
            _tell_skipped(state, data, result, parts)
            continue
        step, last = state.progress.step, state.progress.step == stop_at
        if parts.probe is not None:
            result = replace(result, metrics={**result.metrics, **parts.probe(data.micro_batches, step)})
        logged = last or step % parts.log_every == 0
        save = parts.checkpoints.due(step) or last
        if logged or save:
            state = _count_bad_samples(state, meter, parts)
        if logged:
            _log_step(state, result, meter, parts)
        stopping = parts.checkpoints.stopping
        if stopping:
            _save(state, parts)  # there may be no time for more
        with parts.engine.clock.part("evaluation"):
            for evaluation in parts.evaluations:
                if last or step % evaluation.every_steps == 0:
                    parts.watch(step, "evaluation")
                    _evaluate(evaluation, state, parts.log)
        if save and not stopping:
            _save(state, parts)
        if logged or save:
            meter.restart()  # the next interval measures steps, not what came between them
        parts.after_step()
        if stopping:
            break
    return state


def _save(state: RunState, parts: Parts) -> None:
    parts.watch(state.progress.step, "checkpoint")
    with parts.engine.clock.part("checkpoint"):
        parts.checkpoints.save(state)


def _evaluate(evaluation: Periodic, state: RunState, log: MetricLog) -> None:
    values = evaluation.evaluate(state)
    if values:
        step = state.progress.step
        log.write(step, values)
        log.say("  ".join([f"step {step}", *(f"{name} {value:.4f}" for name, value in values.items())]))


def _advance(state: RunState, data: StepData, result: StepResult) -> RunState:
    """A skipped step reads and does not learn: the cursor goes on, the progress does not."""
    if not result.applied:
        return replace(state, cursor=data.cursor, skipped_steps=state.skipped_steps + 1)
    return replace(state, cursor=data.cursor, progress=state.progress.advance(data.cursor - state.cursor))


def _tell_skipped(state: RunState, data: StepData, result: StepResult, parts: Parts) -> None:
    """Names the samples; those of a rank whose own loss was finite are innocent unless all losses were."""
    keys = [key for batch in data.micro_batches for key in batch.keys]
    found = gather_objects((bool(torch.isfinite(result.metrics["loss"])), keys))
    blamed = [key for finite, ks in found if not finite for key in ks]
    blamed = blamed or [key for _, ks in found for key in ks]
    what = "loss" if any(not finite for finite, _ in found) else "gradient"
    shown = ", ".join(blamed[:64]) + (f" and {len(blamed) - 64} more" if len(blamed) > 64 else "")
    step = state.progress.step + 1
    parts.log.say(f"step {step} skipped: the {what} is not finite ({state.skipped_steps} so far); samples: {shown}")
    if state.skipped_steps > parts.limits.skipped_steps:
        raise RunError(
            where=f"step {step}", expected=f"at most {parts.limits.skipped_steps} steps without a finite {what}",
            found=f"{state.skipped_steps}; samples of the last: {shown}",
            fix="Lower optim.base_lr or set optim.clip_norm; look at these samples. Budget: runtime.max_skipped_steps.",
        )  # fmt: skip


def _count_bad_samples(state: RunState, meter: _Meter, parts: Parts) -> RunState:
    found = [bad for rank in gather_objects(meter.take_bad()) for bad in rank]
    for bad in found:
        parts.log.say(f"bad sample {bad.key} in {bad.shard}: {bad.reason} In its place: {bad.replacement_key}")
    state = replace(state, bad_samples=state.bad_samples + len(found))
    if state.bad_samples > parts.limits.bad_samples:
        raise RunError(
            where="data.max_bad_samples", expected=f"at most {parts.limits.bad_samples} unusable samples",
            found=f"{state.bad_samples}; the last: {', '.join(bad.key for bad in found)}",
            fix="Run `pretrain data verify` on the shards, or raise the budget.",
        )  # fmt: skip
    return state


def _log_step(state: RunState, result: StepResult, meter: _Meter, parts: Parts) -> None:
    means = mean_over_ranks({**result.metrics, **meter.shares(), **_time_shares(meter, parts.engine.clock)})
    images_per_second = meter.num_samples / meter.seconds
    values = {
        **means,
        **result.rates,
        "grad_norm": result.grad_norm,
        "images_per_second": images_per_second,
        **parts.rates(images_per_second),
        "samples_seen": float(state.progress.samples_seen),
        "skipped_steps": float(state.skipped_steps),
        "bad_samples": float(state.bad_samples),
    }
    parts.log.write(state.progress.step, values)
    parts.log.progress(state.progress.step, values)
    for advise in parts.advise:
        if (advice := advise(values)) is not None:
            parts.log.say(advice)


def _time_shares(meter: _Meter, clock: Stopwatch) -> dict[str, torch.Tensor]:
    """Of the time since the last logged step, all of it counted: what went to each part of the work."""
    now = time.perf_counter()
    seconds, meter.logged_at = max(now - meter.logged_at, 1e-9), now
    taken = clock.take()
    return {f"time_{part}": torch.tensor(taken.get(part, 0.0) / seconds) for part in PARTS}


@dataclass(frozen=True)
class _Prepared(Sequence[Batch]):
    """Micro-batches, each on the device only when its turn comes: accumulation is there to bound memory."""

    batches: tuple[Batch, ...]
    prepare: Callable[[Batch], Batch]
    clock: Stopwatch

    def __len__(self) -> int:
        return len(self.batches)

    @overload
    def __getitem__(self, i: int) -> Batch: ...
    @overload
    def __getitem__(self, i: slice) -> list[Batch]: ...
    def __getitem__(self, i: int | slice) -> Batch | list[Batch]:
        if isinstance(i, slice):
            return [self[j] for j in range(len(self))[i]]
        with self.clock.part("copy"):
            return self.prepare(self.batches[i])


@dataclass
class _Meter:
    """What happened since the last logged step, on this rank."""

    num_samples: int = 0  # over all ranks
    waited: float = 0.0
    host: dict[str, float] = field(default_factory=dict)
    bad: list[BadSample] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)
    logged_at: float = field(default_factory=time.perf_counter)

    def waiting(self) -> _Waiting:
        return _Waiting(self)

    def add(self, data: StepData, num_samples: int) -> None:
        self.num_samples += num_samples
        self.bad += data.bad
        for name, seconds in data.seconds.items():
            self.host[name] = self.host.get(name, 0.0) + seconds

    @property
    def seconds(self) -> float:
        return max(time.perf_counter() - self.started, 1e-9)

    def shares(self) -> dict[str, torch.Tensor]:
        """Of the time since: how much was waited for data; and what making that data took, per second, by part."""
        seconds = self.seconds
        values = {
            "data_wait": self.waited / seconds,
            **{f"data_{k}": v / seconds for k, v in self.host.items()},
        }
        return {name: torch.tensor(value) for name, value in values.items()}

    def take_bad(self) -> list[BadSample]:
        taken, self.bad = self.bad, []
        return taken

    def restart(self) -> None:
        self.num_samples, self.waited, self.host, self.started = 0, 0.0, {}, time.perf_counter()


class _Waiting:
    def __init__(self, meter: _Meter) -> None:
        self._meter = meter

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._meter.waited += time.perf_counter() - self._start
