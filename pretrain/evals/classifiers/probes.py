"""Linear classifiers of frozen features, many side by side, and how good each of them is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

LOGITS_PER_CHUNK = 2**25  # bounds the memory of scoring
VALUES_PER_CHUNK = 2**25  # bounds the memory of statistics


@dataclass(frozen=True)
class Probes:
    """S linear classifiers of D standardized features into K classes, all of the features' precision.

    Attributes:
        mean: subtracted from the features, [D].
        std: what they are divided by then, [D].
        weight: [S, K, D].
        bias: [S, K].
    """

    mean: Tensor
    std: Tensor
    weight: Tensor
    bias: Tensor

    def logits(self, values: Tensor) -> Tensor:
        """Features [N, D] -> [N, K, S], as `cross_entropy` takes them."""
        standard = (values - self.mean) / self.std
        flat = torch.addmm(self.bias.flatten(), standard, self.weight.flatten(0, 1).T)
        return flat.view(-1, *self.bias.shape).transpose(1, 2)

    def logits_of_all(self, values: Tensor) -> Tensor:
        """Returns a single classifier's logits of features that may lie elsewhere: [N, D] -> [N, K] on the CPU."""
        chunk = max(1, LOGITS_PER_CHUNK // self.bias.numel())
        parts = [self.logits(x.to(self.bias.device)).squeeze(2).cpu() for x in torch.split(values, chunk)]
        return torch.cat(parts)


def statistics(values: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the features, each [D], summed in fp64; 1 where a feature is constant.

    Args:
        values: [N, D]; may be mapped into memory, and is never copied as a whole.
        rows: of these samples only.
    """
    num = len(values) if rows is None else len(rows)
    mean = sum_of(part.sum(dim=0) for part in _parts(values, rows)) / num
    std = (sum_of((part - mean).square().sum(dim=0) for part in _parts(values, rows)) / num).sqrt()
    std = torch.where(std > 1e-5 * std.max(), std, 1.0)
    return mean.to(values.dtype), std.to(values.dtype)


def sum_of(parts: Iterable[Tensor]) -> Tensor:
    parts = iter(parts)
    total = next(parts)
    for part in parts:
        total = total + part
    return total


def _parts(values: Tensor, rows: Tensor | None) -> Iterator[Tensor]:
    """The features of the rows, fp64, some at a time."""
    chunk = max(1, VALUES_PER_CHUNK // values.shape[1])
    if rows is None:
        yield from (part.double() for part in torch.split(values, chunk))
    else:
        yield from (values[some].double() for some in torch.split(rows, chunk))


def scores(probes: Probes, values: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Returns, for each classifier, the share of right labels and the mean cross entropy, each [S] fp64 on the CPU.

    Args:
        values: [N, D]; may lie elsewhere than the classifiers.
        labels: [N], in [0, K).
    """
    num_settings = len(probes.bias)
    device = probes.bias.device
    right = torch.zeros(num_settings, dtype=torch.float64)
    loss = torch.zeros(num_settings, dtype=torch.float64)
    chunk = max(1, LOGITS_PER_CHUNK // probes.bias.numel())
    for x, y in zip(torch.split(values, chunk), torch.split(labels, chunk), strict=True):
        logits = probes.logits(x.to(device)).transpose(1, 2)  # [chunk, S, K], as they lie in memory
        y = y.to(device)[:, None].expand(-1, num_settings)
        right += (logits.argmax(dim=2) == y).double().sum(dim=0).cpu()
        chosen = logits.gather(2, y[:, :, None]).squeeze(2)
        loss += (logits.logsumexp(dim=2) - chosen).double().sum(dim=0).cpu()
    return right / len(values), loss / len(values)


def topk_share(logits: Tensor, labels: Tensor, k: int) -> float:
    """Share of rows whose label is among the k largest of K logits.

    Args:
        logits: [N, K], K >= k.
        labels: [N].
    """
    return (logits.topk(k, dim=1).indices == labels[:, None]).any(dim=1).double().mean().item()
