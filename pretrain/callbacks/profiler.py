"""A trace of some steps, for chrome://tracing or Perfetto."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from data_pipeline.batch import Batch
from pretrain.callbacks.callback import Callback
from pretrain.monitoring.log import MetricLog
from pretrain.runtime.state import RunState


class Profiler(Callback):
    """Tells torch's profiler where a step ends."""

    def __init__(self, profiler: torch.profiler.profile) -> None:
        self._profiler = profiler

    def after_step(self, state: RunState, micro_batches: tuple[Batch, ...]) -> Mapping[str, Tensor]:
        self._profiler.step()
        return {}


@contextmanager
def profiled(steps: int | None, path: Path, log: MetricLog) -> Iterator[tuple[Callback, ...]]:
    """Gives the callback that traces `steps` applied steps, after two that warm up, to `path`; None: no callback."""
    if steps is None:
        yield ()
        return

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it calls a machine without a GPU an error, on stderr

    def export(profiler: torch.profiler.profile) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(path))

    plan = torch.profiler.schedule(wait=0, warmup=2, active=steps, repeat=1)
    ready = partial(log.keep, str(path))
    with torch.profiler.profile(schedule=plan, on_trace_ready=lambda p: ready(lambda: export(p))) as profiler:
        yield (Profiler(profiler),)
