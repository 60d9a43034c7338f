"""Batch norm with statistics over all ranks, on CPUs too, where torch has none."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d, convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def synchronise_batch_norms(module: nn.Module, device: torch.device) -> nn.Module:
    """Every batch norm in `module` takes its statistics over all ranks when it trains (Ioffe & Szegedy 2015).

    So W ranks with B / W samples each compute what one computes with B; the running statistics stay equal on all
    ranks too. Names of parameters and buffers stay what they are. All ranks must call it on samples of equal number,
    and in the same order.

    Args:
        module: on all ranks the same.
        device: on CUDA, torch's kernels do the work, by way of timm; on a CPU `SynchronisedNorm` does.

    Returns:
        `module`, or what it was converted to where it is a batch norm itself.
    """
    if device.type == "cuda":
        converted: nn.Module = convert_sync_batchnorm(module)
        return converted
    for norm in module.modules():
        if isinstance(norm, _BatchNorm):
            norm.forward = functools.partial(_forward, norm)  # type: ignore[method-assign]
    return module


class SynchronisedNorm(torch.autograd.Function):
    """(x - mean) / sqrt(var + eps), mean and biased variance over the samples of all ranks.

    Gradients are those of the sum of the ranks' losses, as each rank's output depends on every rank's input.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """[B, C, ...] -> normalized, at least fp32; of all ranks' values mean, biased variance [C] and number, fp64."""
        x = x if x.dtype == torch.float64 else x.float()
        size = x.numel() // x.shape[1]
        mean = _sums(x) / size
        near = mean.to(x.dtype)
        var = _sums((x - _column(near, x)).square()) / size - (mean - near).square()
        count = torch.full_like(mean[:1], size)
        sizes = [len(mean), len(var), 1]
        means, variances, counts = torch.split(_gathered(torch.cat([mean, var, count])), sizes, dim=1)
        total = counts.sum()
        mean = (means * counts).sum(0) / total
        # Of squared distances, not of squares less the square of the mean, which would cancel.
        var = ((variances + (means - mean).square()) * counts).sum(0) / total
        scale = (var + eps).rsqrt().to(x.dtype)
        normalized = (x - _column(mean.to(x.dtype), x)).mul_(_column(scale, x))
        ctx.save_for_backward(normalized, scale, total)
        ctx.mark_non_differentiable(mean, var, total)
        return normalized, mean, var, total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor, None]:
        normalized, scale, total = ctx.saved_tensors
        sums = torch.stack([_sums(gradient), _sums(gradient * normalized)])
        dist.all_reduce(sums)
        along_ones, along_itself = (_column((part / total).to(gradient.dtype), gradient) for part in sums)
        return torch.addcmul(gradient - along_ones, normalized, -along_itself) * _column(scale, gradient), None


def _forward(norm: Any, x: Tensor) -> Tensor:
    """A batch norm's forward pass, that of timm's with an activation included."""
    if not norm.training:
        evaluated: Tensor = type(norm).forward(norm, x)
        return evaluated
    normalized: Tensor
    normalized, mean, var, total = SynchronisedNorm.apply(x, norm.eps)
    if norm.track_running_stats:
        _track(norm, mean, var * (total / (total - 1)))
    if norm.affine:
        normalized = torch.addcmul(_column(norm.bias, x), normalized, _column(norm.weight, x))
    normalized = normalized.to(x.dtype)
    if isinstance(norm, BatchNormAct2d):
        normalized = norm.act(norm.drop(normalized))
    return normalized


@torch.no_grad()
def _track(norm: Any, mean: Tensor, var: Tensor) -> None:
    """Running statistics, with unbiased variance, as torch keeps them; a momentum of None averages over all batches."""
    norm.num_batches_tracked.add_(1)
    share = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), share)
    norm.running_var.lerp_(var.to(norm.running_var.dtype), share)


def _gathered(values: Tensor) -> Tensor:
    """[n] -> [W, n]; every rank then computes the same from it, to the bit."""
    rows = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, values)
    return torch.stack(rows)


def _sums(x: Tensor) -> Tensor:
    """[B, C, ...] -> [C], fp64. A sample's own sum is the same on any rank, and the sum of those is as good as exact:
    statistics do not depend on the number of ranks. Over dimensions that are apart `var_mean` takes ten times as long.
    """
    return (x.flatten(2).sum(2) if x.ndim > 2 else x).sum(0, dtype=torch.float64)


def _column(values: Tensor, like: Tensor) -> Tensor:
    return values.view(1, -1, *[1] * (like.ndim - 2))
