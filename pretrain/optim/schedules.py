"""Learning rates as pure functions of the progress; they hold no state, so there is none to resume."""

from __future__ import annotations

import math
from typing import assert_never

from pretrain.optim.config import Constant, Cosine, Schedule, Steps
from pretrain.runtime.state import Progress


def learning_rate(progress: Progress, schedule: Schedule, *, peak_lr: float, warmup_steps: int) -> float:
    """Learning rate of the step to come: linear warmup, then what the schedule says.

    With t steps applied, W of warmup and T in all: peak (t + 1) / (W + 1) while t < W, so that no step is wasted
    at zero; the peak at t = W. From there on:

    - cosine: half a cosine that reaches final_lr * peak at t = T, and stays there. Loshchilov & Hutter 2016
      (arXiv:1608.03983), Eq. 5, without restarts.
    - step: the peak times gamma to the number of milestones passed, one at share m when t >= round(m T). (timm's
      and SimMIM's take the rate of a step from the number of the one before, and so fall a step later.)
    - constant: the peak.

    Args:
        progress: steps applied so far, and steps of the whole run.
        schedule: its kind, and what that kind needs.
        peak_lr: the largest learning rate.
        warmup_steps: W; 0 starts at the peak.
    """
    t, total = progress.step, progress.total_steps
    if t < warmup_steps:
        return constant_learning_rate(progress, peak_lr=peak_lr, warmup_steps=warmup_steps)
    match schedule:
        case Cosine():
            share = min(1.0, (t - warmup_steps) / max(1, total - warmup_steps))
            floor = schedule.final_lr * peak_lr
            return floor + (peak_lr - floor) * (1 + math.cos(math.pi * share)) / 2
        case Steps():
            passed = sum(t >= round(milestone * total) for milestone in schedule.milestones)
            return float(peak_lr * schedule.gamma**passed)
        case Constant():
            return peak_lr
        case _:
            assert_never(schedule)


def constant_learning_rate(progress: Progress, *, peak_lr: float, warmup_steps: int) -> float:
    """The same warmup, and the peak from there on."""
    return peak_lr * min(1.0, (progress.step + 1) / (warmup_steps + 1))


def learning_rates(progress: Progress, schedule: Schedule, *, peak_lr: float, warmup_steps: int) -> tuple[float, float]:
    """Learning rates of the step to come: that of the schedule, and that of modules which keep the peak."""
    scheduled = learning_rate(progress, schedule, peak_lr=peak_lr, warmup_steps=warmup_steps)
    return scheduled, constant_learning_rate(progress, peak_lr=peak_lr, warmup_steps=warmup_steps)
