"""Linear classifiers trained side by side: a step is one batch, and two matrix products for all that read the same."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from timm import optim as timm_optim
from torch import Tensor, nn

from data_pipeline.progress import track
from pretrain.evals.classifiers.config import Rates as Rates
from pretrain.evals.classifiers.config import Training as Training
from pretrain.evals.classifiers.probes import Probes, statistics
from pretrain.optim.config import Cosine
from pretrain.optim.schedules import learning_rate
from pretrain.runtime.state import Progress

MOMENTUM = 0.9
TRUST = 1e-3  # LARS's trust coefficient, as MAE's probe has it
BATCH_NORM_EPS = 1e-6  # likewise
BATCH_NORM_MOMENTUM = 0.1  # of its running statistics
LR_BATCH = 256  # learning rates are given for a batch of this size, and scaled linearly

Examples = tuple[Sequence[Tensor], Tensor]  # features [B, D] of each readout, labels [B]


def rate_factor(training: Training, step: int) -> float:
    """What all learning rates are multiplied by at a step."""
    progress = Progress(step, training.num_steps, step * training.batch_size)
    scale = training.batch_size / LR_BATCH
    return learning_rate(progress, Cosine(steps=training.num_steps), peak_lr=scale, warmup_steps=training.warmup_steps)


class Heads:
    """S classifiers of one readout in training; every setting is trained as if alone.

    Args:
        settings: S learning rates and weight decays.
        training: what they have in common.
        num_classes: K.
        moments: mean and deviation of the features, each [D]; with batch norm only their width and precision count.
        device: to train on.
    """

    def __init__(
        self,
        settings: Sequence[Rates],
        training: Training,
        *,
        num_classes: int,
        moments: tuple[Tensor, Tensor],
        device: torch.device,
    ) -> None:
        self.mean, self.std = (part.to(device) for part in moments)
        self._scale = 1 / self.std
        self.norm: nn.BatchNorm1d | None = None
        if training.batch_norm:
            self.norm = nn.BatchNorm1d(
                len(self.mean),
                eps=BATCH_NORM_EPS,
                momentum=BATCH_NORM_MOMENTUM,
                affine=False,
                device=device,
                dtype=self.mean.dtype,
            )
        self.shape = (len(settings), num_classes)
        # A setting's classifier lies in one piece, as a linear layer's does: [S * K, D] is [S, K, D].
        self.weight = self.mean.new_zeros(len(settings) * num_classes, len(self.mean))
        self.bias = self.mean.new_zeros(len(settings) * num_classes)
        if training.initial_std:
            first = torch.empty(num_classes, len(self.mean))
            generator = torch.Generator().manual_seed(training.seed)
            nn.init.trunc_normal_(first, std=training.initial_std, generator=generator)
            self.weight.copy_(first.repeat(len(settings), 1))
        self.update = _UPDATES[training.optimizer](settings, self.weight, self.bias)
        self._logits, self._softmax = self.bias.new_empty(0), self.bias.new_empty(0)

    def step(self, values: Tensor, labels: Tensor, factor: float) -> None:
        """One step on features [B, D] and labels [B] of the same device; `factor` multiplies the learning rates."""
        x = (values - self.mean).mul_(self._scale) if self.norm is None else self.norm(values)
        # Room for logits and their softmax is taken once: they may be larger than all the rest.
        logits = torch.addmm(self.bias, x, self.weight.T, out=self._logits.resize_(len(x), len(self.bias)))
        # The gradient of the mean cross entropy with respect to the logits is (softmax - one-hot) / B.
        residual = self._softmax.resize_(len(x), *self.shape)
        torch.softmax(logits.view(residual.shape), dim=2, out=residual)
        residual[torch.arange(len(x), device=x.device), :, labels] -= 1
        self.update(residual.view(len(x), -1), x, factor)

    def probes(self) -> Probes:
        """As they are now; with batch norm, by its running statistics."""
        mean, std = self.mean, self.std
        if self.norm is not None:
            assert self.norm.running_mean is not None
            assert self.norm.running_var is not None
            mean, std = self.norm.running_mean, (self.norm.running_var + BATCH_NORM_EPS).sqrt()
        return Probes(mean, std, self.weight.view(*self.shape, -1), self.bias.view(self.shape))


class _Sgd:
    """SGD with momentum, as torch's, without a tensor for the gradient."""

    def __init__(self, settings: Sequence[Rates], weight: Tensor, bias: Tensor) -> None:
        self.weight, self.bias = weight, bias
        rates, decays = torch.tensor(settings, dtype=bias.dtype).T.to(bias.device)  # each [S]
        num_classes = len(bias) // len(settings)
        self.rates = rates.repeat_interleave(num_classes)  # [S * K]
        self.decays = decays.repeat_interleave(num_classes) if decays.any() else None
        self.weight_momentum, self.bias_momentum = torch.zeros_like(weight), torch.zeros_like(bias)

    def __call__(self, residual: Tensor, x: Tensor, factor: float) -> None:
        """With B times the gradient with respect to the logits, [B, S * K], and what they were made of, [B, D]."""
        self.weight_momentum.addmm_(residual.T, x, beta=MOMENTUM, alpha=1 / len(x))
        if self.decays is not None:
            self.weight_momentum.addcmul_(self.weight, self.decays[:, None])
        self.bias_momentum.addmv_(residual.T, residual.new_ones(len(x)), beta=MOMENTUM, alpha=1 / len(x))
        self.weight.addcmul_(self.weight_momentum, self.rates[:, None], value=-factor)
        self.bias.addcmul_(self.bias_momentum, self.rates, value=-factor)


class _Lars:
    """timm's LARS: of each setting a group of its weights, and one of its biases, which are not adapted."""

    def __init__(self, settings: Sequence[Rates], weight: Tensor, bias: Tensor) -> None:
        self.weight_gradient, self.bias_gradient = torch.empty_like(weight), torch.empty_like(bias)
        num = len(settings)
        parts = ((weight, self.weight_gradient, True), (bias, self.bias_gradient, False))
        groups: list[dict[str, Any]] = []
        self.rates: list[float] = []  # of each group
        for tensor, gradient, adapted in parts:
            for setting, values, slope in zip(settings, tensor.chunk(num), gradient.chunk(num), strict=True):
                parameter = nn.Parameter(values)  # shares its storage
                parameter.grad = slope
                decay = setting.weight_decay if adapted else 0.0
                groups.append({"params": [parameter], "weight_decay": decay, "always_adapt": adapted})
                self.rates.append(setting.learning_rate)
        self.optimizer = timm_optim.Lars(groups, lr=0.0, momentum=MOMENTUM, trust_coeff=TRUST)

    def __call__(self, residual: Tensor, x: Tensor, factor: float) -> None:
        torch.mm(residual.T, x, out=self.weight_gradient).div_(len(x))
        torch.mean(residual, dim=0, out=self.bias_gradient)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = factor * rate
        self.optimizer.step()


_UPDATES: dict[str, type[_Sgd] | type[_Lars]] = {"sgd": _Sgd, "lars": _Lars}


@torch.no_grad()
def train(
    examples: Iterable[Examples],
    moments: Sequence[tuple[Tensor, Tensor]],
    settings: Sequence[Rates],
    training: Training,
    *,
    num_classes: int,
    device: torch.device,
    label: str,
) -> tuple[Probes, ...]:
    """All settings on all readouts, in one pass over the batches.

    Args:
        examples: `training.num_steps` batches or more.
        moments: mean and deviation of the features of each readout (`statistics`).
        settings: S, for each readout.
        training: what they have in common.
        num_classes: K.
        device: to train on.
        label: of the progress line.

    Returns:
        S classifiers of each readout, in the order of the settings. One that diverged holds values that are not finite.
    """
    heads = [Heads(settings, training, num_classes=num_classes, moments=m, device=device) for m in moments]
    steps = zip(range(training.num_steps), examples, strict=False)
    for step, (values, labels) in track(steps, label=label, total=training.num_steps):
        labels, factor = labels.to(device), rate_factor(training, step)
        for head, x in zip(heads, values, strict=True):
            head.step(x.to(device), labels, factor)
    return tuple(head.probes() for head in heads)


def fit_each(
    values: Sequence[Tensor],
    labels: Tensor,
    settings: Sequence[Rates],
    training: Training,
    *,
    rows: Tensor | None = None,
    num_classes: int,
    device: torch.device,
    label: str,
) -> tuple[Probes, ...]:
    """`train` on features at hand, standardized by their own mean and deviation.

    Args:
        values: of each readout, [N, D of that readout]; may be mapped into memory.
        labels: [N] int64, in [0, K).
        rows: the samples to fit on; None: all. A batch is at most as many.
    """
    num_samples = len(labels) if rows is None else len(rows)
    training = replace(training, batch_size=min(training.batch_size, num_samples))
    examples = (
        (tuple(v.index_select(0, chosen) for v in values), labels[chosen])
        for chosen in (some if rows is None else rows[some] for some in batches(num_samples, training))
    )
    return train(
        examples,
        [statistics(v, rows) for v in values],
        settings,
        training,
        num_classes=num_classes,
        device=device,
        label=label,
    )


def batches(num_samples: int, training: Training) -> Iterator[Tensor]:
    """Numbers of the samples of each step: epoch after epoch in random order, less an incomplete last batch."""
    generator = torch.Generator().manual_seed(training.seed)
    whole = num_samples - num_samples % training.batch_size
    for _ in range(-(-training.num_steps * training.batch_size // whole)):
        yield from torch.split(torch.randperm(num_samples, generator=generator)[:whole], training.batch_size)
