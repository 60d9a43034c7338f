"""Many linear classifiers trained side by side on the same features: one matrix product a step for all."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data_pipeline.progress import track

MOMENTUM = 0.9
LR_BATCH = 256  # learning rates are given for a batch of this size, and scaled linearly
LOGITS_PER_CHUNK = 2**25  # bounds the memory of scoring


@dataclass(frozen=True)
class Probes:
    """S linear classifiers of D standardised features into K classes, all fp32.

    Attributes:
        mean: of the features they were fitted on, [D].
        std: their standard deviation, [D]; 1 where a feature is constant.
        weight: [D, K, S].
        bias: [K, S].
    """

    mean: Tensor
    std: Tensor
    weight: Tensor
    bias: Tensor

    def logits(self, values: Tensor) -> Tensor:
        """Features [N, D] -> [N, K, S]."""
        flat = (values - self.mean) / self.std @ self.weight.flatten(1) + self.bias.flatten()
        return flat.view(-1, *self.bias.shape)


def fit(
    values: Tensor,
    labels: Tensor,
    settings: Sequence[tuple[float, float]],
    *,
    num_classes: int,
    num_steps: int,
    batch_size: int,
    seed: int,
    label: str,
) -> Probes:
    """Multinomial logistic regression by SGD (momentum 0.9, cosine to zero), for all settings in one pass.

    Every setting sees the same batches and starts at zero; none influences another.

    Args:
        values: features, [N, D]; standardised here by their own mean and deviation.
        labels: [N] int64, in [0, K), on the same device.
        settings: S pairs of a learning rate (for a batch of 256) and a weight decay (L2, not on biases).
        num_classes: K.
        num_steps: SGD steps.
        batch_size: samples of a step; at most N are taken.
        seed: of the order of samples.
        label: of the progress line.

    Returns:
        the S classifiers, in the order of the settings. One that diverged holds values that are not finite.
    """
    std, mean = torch.std_mean(values, dim=0, correction=0)
    std = torch.where(std > 1e-5 * std.max(), std, 1.0)
    standard = (values - mean) / std
    batch_size = min(batch_size, len(values))
    rates, decays = torch.tensor(settings, dtype=values.dtype, device=values.device).T  # each [S]
    rates = (rates * batch_size / LR_BATCH).repeat(num_classes)  # [K * S], a column's own
    decays = decays.repeat(num_classes)
    weight = values.new_zeros(values.shape[1], num_classes * len(settings))
    bias = values.new_zeros(num_classes * len(settings))
    weight_momentum, bias_momentum = torch.zeros_like(weight), torch.zeros_like(bias)
    rows = torch.arange(batch_size, device=values.device)
    batches = _batches(len(values), batch_size, num_steps, seed)
    for step, chosen in enumerate(track(batches, label=label, total=num_steps)):
        chosen = chosen.to(values.device)
        x, y = standard[chosen], labels[chosen]
        # The gradient of the mean cross entropy with respect to the logits is (softmax - one-hot) / B.
        residual = torch.addmm(bias, x, weight).view(batch_size, num_classes, -1).softmax(dim=1)
        residual[rows, y] -= 1
        residual = residual.view(batch_size, -1) / batch_size
        cosine = (1 + math.cos(math.pi * step / num_steps)) / 2
        weight_momentum.mul_(MOMENTUM).addmm_(x.T, residual).addcmul_(weight, decays)
        bias_momentum.mul_(MOMENTUM).add_(residual.sum(dim=0))
        weight.addcmul_(weight_momentum, rates, value=-cosine)
        bias.addcmul_(bias_momentum, rates, value=-cosine)
    shape = (num_classes, len(settings))
    return Probes(mean, std, weight.view(-1, *shape), bias.view(shape))


def _batches(num_samples: int, batch_size: int, num_steps: int, seed: int) -> Iterator[Tensor]:
    """Indices [batch_size] of each step: epoch after epoch in random order, less an incomplete last batch."""
    generator = torch.Generator().manual_seed(seed)
    left = num_steps
    while left:
        order = torch.randperm(num_samples, generator=generator)
        whole = torch.split(order[: num_samples - num_samples % batch_size], batch_size)[:left]
        left -= len(whole)
        yield from whole


def scores(probes: Probes, values: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Of each classifier, the share of right labels and the mean cross entropy, each [S] fp64 on the CPU."""
    num_settings = probes.bias.shape[1]
    right = torch.zeros(num_settings, dtype=torch.float64)
    loss = torch.zeros(num_settings, dtype=torch.float64)
    chunk = max(1, LOGITS_PER_CHUNK // probes.bias.numel())
    for x, y in zip(torch.split(values, chunk), torch.split(labels, chunk), strict=True):
        logits = probes.logits(x)  # [chunk, K, S]
        right += (logits.argmax(dim=1) == y[:, None]).double().sum(dim=0).cpu()
        targets = y[:, None].expand(-1, num_settings)
        loss += torch.nn.functional.cross_entropy(logits, targets, reduction="none").double().sum(dim=0).cpu()
    return right / len(values), loss / len(values)


def topk_share(logits: Tensor, labels: Tensor, k: int) -> float:
    """Share of rows whose label is among the k largest of K logits.

    Args:
        logits: [N, K], K >= k.
        labels: [N].
    """
    return (logits.topk(k, dim=1).indices == labels[:, None]).any(dim=1).double().mean().item()
