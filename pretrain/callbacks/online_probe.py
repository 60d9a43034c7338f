"""A linear classifier on the encoder, trained beside the objective: how good the features are, at every step.

The encoder does not notice. Its features are taken without gradient, by a forward pass of its own in evaluation mode,
after the step and on the same samples: the same for every objective, also for those that show the encoder only a part
of an image, and what an evaluation later takes. The classifier has an optimizer of its own, and every rank has all of
it, whatever the ZeRO stage: ranks sum two small tensors a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from data_pipeline.assemble import check
from data_pipeline.batch import Batch, BatchSpec
from data_pipeline.datasets.dataset import Dataset
from data_pipeline.errors import FieldError, InputError
from pretrain.callbacks.callback import Callback
from pretrain.checkpoints.files import AUXILIARY_PREFIX
from pretrain.engine.engine import Engine
from pretrain.engine.training_state import Fragment
from pretrain.objectives.contract import Objective
from pretrain.recipe import recipe
from pretrain.runtime.collectives import sum_over_ranks
from pretrain.runtime.state import RunState

MOMENTUM = 0.9
STATISTICS_MOMENTUM = 0.1  # share of the latest batch in the running statistics, as batch norm has it
EPS = 1e-6


@dataclass(frozen=True)
class ProbeShape:
    """The sizes of a linear classifier: features [B, width] -> logits [B, num_classes]."""

    width: int
    num_classes: int


def find_probe_shape(objective: Objective, train: Dataset, val: Dataset | None) -> ProbeShape:
    """Finds the sizes of the classifier: its classes are the objective's, or all that the training data have.

    Args:
        objective: on the meta device; its encoder is left in evaluation mode.
        train: what is trained on.
        val: what is validated on; None: nothing.

    Raises:
        FieldError: a data set has no label for every image, or labels beyond those classes.
        InputError: the encoder does not make one row of features for each image.
    """
    size = objective.needs.image_size
    num_classes = objective.needs.num_classes or max(1, _num_classes(train))
    for name, dataset in (("data.train", train), ("data.val", val)):
        try:
            if dataset is not None:
                check(dataset, BatchSpec(size, num_classes=num_classes))
        except FieldError as error:
            raise FieldError(
                f"online_probe, {name}, {error.where}", error.expected, error.found,
                "Leave online_probe out, or give shards with a class for every image.",
            ) from error  # fmt: skip
    with torch.no_grad():
        features = objective.encoder.eval()(torch.empty(2, 3, size, size, device="meta"))
    if features.ndim != 2:
        raise InputError(
            where="online_probe", expected="an encoder that pools: features [B, D]",
            found=f"features of {features.ndim} dimensions", fix="Set model.options.global_pool, or leave it out.",
        )  # fmt: skip
    return ProbeShape(features.shape[1], num_classes)


def probe_bytes(config: recipe.OnlineProbe, shape: ProbeShape) -> int:
    """Bytes of the whole state of `OnlineProbe`, which each rank has and a checkpoint holds once."""
    weights_and_momenta = 4 * 2 * shape.num_classes * (shape.width + 1)
    statistics_and_steps = 4 * 2 * shape.width + 8
    return weights_and_momenta + (statistics_and_steps if config.batch_norm else 0)


def _num_classes(dataset: Dataset) -> int:
    if dataset.parts:
        return max(_num_classes(part.dataset) for part in dataset.parts)
    if (soft := dataset.num_soft_classes) is not None:
        return soft
    counts = dataset.label_counts
    seen = 0 if counts is None else int(np.flatnonzero(counts).max(initial=-1)) + 1
    return max(seen, len(dataset.classes or ()))


class OnlineProbe:
    """Multinomial logistic regression by SGD (momentum 0.9, constant rate), from zero.

    Features are standardized before by the mean and variance of the global batch, gradients are of the mean over the
    global batch: how many ranks share it does not matter. Where labels are soft, as of mixed images, the cross entropy
    is against them, and what counts as right is the largest.

    Args:
        config: of the recipe.
        shape: of the classifier.
        engine: whose encoder is probed; its weights are the latest, not their moving average.
    """

    def __init__(self, config: recipe.OnlineProbe, shape: ProbeShape, engine: Engine) -> None:
        self.num_classes = shape.num_classes
        self._config, self._engine = config, engine
        device = engine.device
        self._weight = torch.zeros(shape.num_classes, shape.width, device=device, requires_grad=True)
        self._bias = torch.zeros(shape.num_classes, device=device, requires_grad=True)
        self._mean = torch.zeros(shape.width, device=device)  # running, as the variance; for validation
        self._var = torch.ones(shape.width, device=device)
        self._steps = torch.zeros(1, dtype=torch.int64, device=device)  # that the statistics are of
        groups = ({"params": [self._weight], "weight_decay": config.weight_decay}, {"params": [self._bias]})
        self._optimizer = torch.optim.SGD(groups, lr=config.lr, momentum=MOMENTUM)
        for p in (self._weight, self._bias):  # there from the start, for a checkpoint to be loaded into
            self._optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)

    def train(self, batches: Iterable[Batch], step: int) -> dict[str, Tensor]:
        """One step of the classifier, where one is due; every rank calls it after a step of the engine.

        Args:
            batches: this rank's micro-batches of that step as the objective gets them, of which it takes the first view
                and the labels; asked for only where a step is due.
            step: steps applied, that one included.

        Returns:
            `probe/loss` and `probe/top1` of the global batch before the classifier's step, fp32 scalars, equal on all
            ranks; nothing where no step was due. A step whose loss or gradient is not finite changes nothing.
        """
        if step % self._config.every_steps:
            return {}
        with self._engine.clock.part("evaluation"):
            found = [(self._engine.represent(batch), _labels(batch)) for batch in batches]
            features, labels = (torch.cat(parts) for parts in zip(*found, strict=True))
            moments = _moments(features) if self._config.batch_norm else None
            x = features if moments is None else _standardized(features, *moments)
            means = self._gradient(x, labels)  # of the weight, the bias, then loss and top1
            if torch.isfinite(means).all():
                self._step(means, moments)
            loss, top1 = means[-2:].unbind()
            return {"probe/loss": loss, "probe/top1": top1}

    @torch.no_grad()
    def measure(self, batch: Batch) -> dict[str, Tensor]:
        """`probe_loss` and `probe_top1` of one rank's batch, by the running statistics; changes nothing.

        At ZeRO 3 every rank must call it.
        """
        features = self._engine.represent(batch)
        x = _standardized(features, self._mean, self._var) if self._config.batch_norm else features
        loss, right = _loss_and_right(F.linear(x, self._weight, self._bias), _labels(batch))
        return {"probe_loss": loss / len(batch), "probe_top1": right / len(batch)}

    def fragments(self) -> list[Fragment]:
        """The whole state for a checkpoint, as live views; every rank has all of it."""
        tensors = {
            "weight": self._weight,
            "bias": self._bias,
            "momentum/weight": self._optimizer.state[self._weight]["momentum_buffer"],
            "momentum/bias": self._optimizer.state[self._bias]["momentum_buffer"],
        }
        if self._config.batch_norm:  # without it they are never written, and must not be taken for statistics
            tensors |= {"mean": self._mean, "var": self._var, "steps": self._steps}
        return [
            Fragment(f"{AUXILIARY_PREFIX}{name}", tuple(tensor.shape), 0, tensor.detach().view(-1), replicated=True)
            for name, tensor in tensors.items()
        ]

    def _gradient(self, x: Tensor, labels: Tensor) -> Tensor:
        """The gradient of the mean loss over all ranks by weight and bias, then that loss and top-1, in one row."""
        loss, right = _loss_and_right(F.linear(x, self._weight, self._bias), labels)
        gradients = torch.autograd.grad(loss, (self._weight, self._bias))
        count = torch.full_like(right, len(x))
        sums = torch.cat([*(gradient.view(-1) for gradient in gradients), torch.stack([loss.detach(), right, count])])
        sum_over_ranks(sums)
        return sums[:-1] / sums[-1]

    @torch.no_grad()
    def _step(self, means: Tensor, moments: tuple[Tensor, Tensor] | None) -> None:
        num_weights = self._weight.numel()
        self._weight.grad = means[:num_weights].view_as(self._weight)
        self._bias.grad = means[num_weights:-2]
        self._optimizer.step()
        self._optimizer.zero_grad()
        if moments is not None:
            self._steps += 1
            # The first few are averaged evenly, so that what the statistics began as is gone at once.
            share = (1 / self._steps).clamp(min=STATISTICS_MOMENTUM)
            for running, latest in zip((self._mean, self._var), moments, strict=True):
                running.lerp_(latest, share)


class ProbeTraining(Callback):
    """Trains the probe on the batches of every applied step.

    Args:
        probe: of the engine's encoder.
        prepare: makes the normalized batch on the device out of a host batch.
    """

    def __init__(self, probe: OnlineProbe, prepare: Callable[[Batch], Batch]) -> None:
        self._probe, self._prepare = probe, prepare

    def after_step(self, state: RunState, micro_batches: tuple[Batch, ...]) -> dict[str, Tensor]:
        """Brings no more to the device than the probe looks at."""
        looked_at = (replace(batch, views=batch.views[:1], masks=None, tokens=None) for batch in micro_batches)
        return self._probe.train(map(self._prepare, looked_at), state.progress.step)


def _labels(batch: Batch) -> Tensor:
    assert batch.labels is not None  # preflight saw to them
    return batch.labels.float() if batch.labels.ndim == 2 else batch.labels


def _loss_and_right(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over the batch: of the cross entropy, and of samples whose largest logit is at their label."""
    hard = labels.argmax(1) if labels.ndim == 2 else labels
    return F.cross_entropy(logits, labels, reduction="sum"), (logits.argmax(1) == hard).sum().to(logits.dtype)


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of each feature over the global batch, fp32 [D]; summed in fp64, as the ranks' order varies."""
    x = features.double()
    sums = torch.stack([x.sum(0), x.square().sum(0), torch.full_like(x[0], len(x))])
    total, squares, count = sum_over_ranks(sums).unbind()
    mean = total / count
    return mean.float(), (squares / count - mean.square()).clamp(min=0).float()


def _standardized(features: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """Batch norm without weights of its own, as He et al. 2021 (arXiv:2111.06377, app. A.1) put it before a probe."""
    return (features - mean) * (var + EPS).rsqrt()
