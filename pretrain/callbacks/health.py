"""Health checks on logged values: advice where something goes wrong without being an error."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from data_pipeline.batch import Batch
from pretrain.callbacks.callback import Callback
from pretrain.runtime.state import RunState

HealthCheck = Callable[[Mapping[str, float]], str | None]  # values of a logged step -> a sentence of advice, or None

_COLLAPSED = 0.1  # share of the standard deviation of evenly spread embeddings
_WAITING = 0.15  # share of the time waited for data from which on advice is given
_UNDRAWN = 0.05  # share of crops that are not drawn, likewise


class UndrawnCrops(Callback):
    """Logs the share of views, since this process began, whose crop was not drawn: none fitted in the image."""

    def __init__(self) -> None:
        self._undrawn, self._views = 0, 0

    def after_step(self, state: RunState, micro_batches: tuple[Batch, ...]) -> dict[str, Tensor]:
        self._undrawn += sum(batch.undrawn_crops for batch in micro_batches)
        self._views += sum(len(batch) * len(batch.views) for batch in micro_batches)
        return {"undrawn_crops": torch.tensor(self._undrawn / max(1, self._views))}


class HealthChecks(Callback):
    """Says what health checks find in the values of each logged step."""

    def __init__(self, checks: Sequence[HealthCheck], say: Callable[[str], None]) -> None:
        self._checks, self._say = tuple(checks), say

    def on_log(self, values: Mapping[str, float]) -> None:
        for check in self._checks:
            if (advice := check(values)) is not None:
                self._say(advice)


class Debounced:
    """A health check that speaks once its finding has held for some logged steps, and then not again for many more.

    Args:
        check: the health check.
        lasting: logged steps in a row for which the finding must hold.
        again: logged steps after which it may speak again.
    """

    def __init__(self, check: HealthCheck, *, lasting: int = 3, again: int = 200) -> None:
        self._check, self._lasting, self._again = check, lasting, again
        self._held, self._silent = 0, 0

    def __call__(self, values: Mapping[str, float]) -> str | None:
        advice = self._check(values)
        self._held = self._held + 1 if advice else 0
        self._silent = max(0, self._silent - 1)
        if self._held < self._lasting or self._silent:
            return None
        self._silent = self._again
        return advice


def collapse(values: Mapping[str, float]) -> str | None:
    """Gives advice where `embedding_std` says that all images get nearly the same embedding."""
    found = [value for name, value in values.items() if name.rpartition("/")[2] == "embedding_std"]  # or of a term
    std = min(found, default=1.0)
    if std >= _COLLAPSED:
        return None
    return (
        f"the embeddings collapse: embedding_std is {std:.3f} (1 = spread evenly, 0 = the same for every image), and "
        "the encoder learns nothing from a loss that is this low; lower optim.base_lr, lengthen schedule.warmup or "
        "enlarge batch.global_size, and begin anew"
    )


def data_brake(values: Mapping[str, float], num_workers: int, idle_cores: int) -> str | None:
    """Gives advice where training waits for data: how much, what the time goes to, what would help.

    Args:
        values: of a logged step: `data_wait`, and `data_read`, `data_decode`, `data_transform`, seconds per second.
        num_workers: loader processes of a rank.
        idle_cores: of this machine, that no rank's thread and no worker was given.
    """
    wait = values.get("data_wait", 0.0)
    parts = {name: values.get(f"data_{name}", 0.0) for name in ("read", "decode", "transform")}
    total = sum(parts.values())
    if wait < _WAITING or total <= 0:
        return None
    shares = ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in parts.items())
    if parts["read"] > total / 2:
        help_ = "put the shards on faster storage, or raise runtime.num_workers so that reads overlap"
    elif idle_cores > 0:
        help_ = f"set runtime.num_workers={num_workers + idle_cores} (now {num_workers}; {idle_cores} cores are idle)"
    elif parts["decode"] > total / 2:
        help_ = "make the images smaller once (`pretrain data convert --short-side`): no core is idle"
    else:
        help_ = "take smaller views or bilinear interpolation (data.views), or add cores: none is idle"
    return f"data is the brake: {wait:.0%} of the time is waited for it ({shares}); {help_}"


def undrawn_crops(values: Mapping[str, float]) -> str | None:
    """Gives advice where many images have no crop of the recipe's area and ratio, and so get one and the same."""
    share = values.get("undrawn_crops", 0.0)
    if share < _UNDRAWN:
        return None
    return (
        f"{share:.0%} of the crops so far are not drawn: none with the area of data.views.scale and the shape of "
        "data.views.ratio fits in those images, which get the same centered crop in every epoch; widen the two, or set "
        "data.views.crop=square, in another run"
    )


def idle_cores(num_workers: int, ranks_of_machine: int) -> int:
    """Cores for each rank of this machine beside its own threads and workers."""
    cores = len(os.sched_getaffinity(0)) // ranks_of_machine
    return max(0, cores - torch.get_num_threads() - num_workers)


def usual_checks(num_workers: int, ranks_of_machine: int) -> tuple[HealthCheck, ...]:
    """The health checks of every run.

    Args:
        num_workers: loader processes of a rank.
        ranks_of_machine: ranks that share the cores of this machine.
    """
    idle = idle_cores(num_workers, ranks_of_machine)
    brake = Debounced(partial(data_brake, num_workers=num_workers, idle_cores=idle))
    return brake, Debounced(collapse), Debounced(undrawn_crops, lasting=2, again=sys.maxsize)
