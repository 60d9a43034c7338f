"""Learning rates as pure functions of the progress; they hold no state, so there is none to resume."""

from __future__ import annotations

import math

from pretrain.recipe import Schedule
from pretrain.state import Progress


def learning_rate(progress: Progress, schedule: Schedule, *, peak_lr: float, warmup_steps: int) -> float:
    """Learning rate of the step to come: linear warmup, then half a cosine.

    Loshchilov & Hutter 2016 (arXiv:1608.03983), Eq. 5, without restarts. With t steps applied, W of warmup
    and T in all: peak (t + 1) / (W + 1) while t < W, so that no step is wasted at zero; the peak at t = W;
    then half a cosine that reaches final_lr * peak at t = T, and stays there.

    Args:
        progress: steps applied so far, and steps of the whole run.
        schedule: `final_lr`, as a share of the peak.
        peak_lr: the largest learning rate, where `final_lr` is at most 1.
        warmup_steps: W; 0 starts at the peak.
    """
    t, total = progress.step, progress.total_steps
    if t < warmup_steps:
        return peak_lr * (t + 1) / (warmup_steps + 1)
    share = min(1.0, (t - warmup_steps) / max(1, total - warmup_steps))
    floor = schedule.final_lr * peak_lr
    return floor + (peak_lr - floor) * (1 + math.cos(math.pi * share)) / 2
